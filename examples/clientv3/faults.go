// Cases in which members die.
package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const watched = "watched"

// write puts the next value until it is done; one whose fate is unknown is read.
func write(ctx context.Context, client *clientv3.Client, value int) error {
	want := strconv.Itoa(value)
	return until("write "+want, func() error {
		trying, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		is := clientv3.Compare(clientv3.Value(watched), "!=", want)
		_, err := client.Txn(trying).If(is).Then(clientv3.OpPut(watched, want)).Commit()
		return err
	})
}

// follow reports the values that a watcher is told until it has seen `last`, each of which must be the one after the one before.
func follow(told clientv3.WatchChan, last int) error {
	next := 1
	for answer := range told {
		if err := answer.Err(); err != nil {
			return fmt.Errorf("the watcher was told %w before value %d", err, next)
		}
		for _, event := range answer.Events {
			if err := expect("the watcher's next value", string(event.Kv.Value), strconv.Itoa(next)); err != nil {
				return err
			}
			if next == last {
				return nil
			}
			next++
		}
	}
	return fmt.Errorf("the watcher has ended before value %d", next)
}

func restarts(ctx context.Context, c *cluster) error {
	const each = 20
	session, err := concurrency.NewSession(c.client, concurrency.WithTTL(15))
	if err != nil {
		return err
	}
	defer session.Close()
	begin, err := c.client.Put(ctx, watched, "0")
	if err != nil {
		return err
	}
	after := clientv3.WithRev(begin.Header.Revision + 1)
	following, stop := context.WithCancel(ctx)
	defer stop()
	last := each * (members + 1)
	ended := make(chan error, 2)
	go func() { ended <- follow(c.client.Watch(following, watched, after), last) }()
	go func() {
		ended <- follow(c.client.Watch(clientv3.WithRequireLeader(following), watched, after, clientv3.WithProgressNotify()), last)
	}()
	value := 0
	some := func() error {
		for range each {
			value++
			if err := write(ctx, c.client, value); err != nil {
				return err
			}
		}
		return nil
	}
	for member := range members {
		if err := c.kill(member); err != nil {
			return err
		}
		if err := some(); err != nil {
			return fmt.Errorf("while %s was gone: %w", name(member), err)
		}
		if err := c.start(member); err != nil {
			return err
		}
		if err := c.waitReady(member); err != nil {
			return err
		}
	}
	if err := some(); err != nil {
		return err
	}
	for range cap(ended) {
		if err := <-ended; err != nil {
			return err
		}
	}
	select {
	case <-session.Done():
		return fmt.Errorf("the session has ended while a quorum lived")
	default:
		return nil
	}
}

func requireLeader(ctx context.Context, c *cluster) error {
	alone, err := connect(func(config *clientv3.Config) { config.Endpoints = []string{"http://" + address(0, 2379)} })
	if err != nil {
		return err
	}
	defer alone.Close()
	begin, err := alone.Put(ctx, watched, "0")
	if err != nil {
		return err
	}
	after := clientv3.WithRev(begin.Header.Revision + 1)
	following, stop := context.WithCancel(ctx)
	defer stop()
	patient := alone.Watch(following, watched, after)
	strict := alone.Watch(clientv3.WithRequireLeader(following), watched, after)
	for member := 1; member < members; member++ {
		if err := c.kill(member); err != nil {
			return err
		}
	}
	select {
	case answer := <-strict:
		if err := answer.Err(); !errors.Is(err, rpctypes.ErrNoLeader) {
			return fmt.Errorf("with RequireLeader and no quorum: got %v, expected %v", err, rpctypes.ErrNoLeader)
		}
	case answer := <-patient:
		return fmt.Errorf("a watch without RequireLeader was told %v", answer.Err())
	case <-ctx.Done():
		return fmt.Errorf("nothing was told to who requires a leader: %w", ctx.Err())
	}
	for member := 1; member < members; member++ {
		if err := errors.Join(c.start(member), c.waitReady(member)); err != nil {
			return err
		}
	}
	if err := write(ctx, alone, 1); err != nil {
		return err
	}
	return follow(patient, 1)
}
