// What a member that dies and comes back costs those who write round robin over all, as JuiceFS does.
package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	writers    = 16
	stateValue = 512
	stateBatch = 100
	// For a write: longer than an election.
	writePatience = 15 * time.Second
	// A member that died is missed by the others within this.
	noticed = time.Second
	// Writing goes on for so long before a kill, while the member is gone, and after its return.
	calm = 2 * time.Second
)

// A writer has one write in flight, always, over connections of its own.
type writer struct {
	key    string
	client *clientv3.Client
	// The newest value that was acknowledged, and the newest that was tried.
	acknowledged, tried int
}

// A failedWrite is one that was not acknowledged; its client tries the next one.
type failedWrite struct {
	writer int
	begin  time.Time
	err    error
}

type writing struct {
	writers      [writers]*writer
	acknowledged atomic.Int64
	mutex        sync.Mutex
	failed       []failedWrite
	// The newest acknowledgement, and the longest time between two of them.
	newest  time.Time
	longest time.Duration
}

func (w *writing) run(ctx context.Context, number int, stop *atomic.Bool) {
	writer := w.writers[number]
	for !stop.Load() {
		begin := time.Now()
		trying, cancel := context.WithTimeout(ctx, writePatience)
		writer.tried++
		_, err := writer.client.Put(trying, writer.key, strconv.Itoa(writer.tried))
		cancel()
		w.mutex.Lock()
		if err != nil {
			w.failed = append(w.failed, failedWrite{number, begin, err})
		} else {
			writer.acknowledged = writer.tried
			w.acknowledged.Add(1)
			now := time.Now()
			w.longest = max(w.longest, now.Sub(w.newest))
			w.newest = now
		}
		w.mutex.Unlock()
	}
}

// counted gives and forgets what failed, and the longest time without an acknowledged write.
func (w *writing) counted() ([]failedWrite, time.Duration) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	failed, longest := w.failed, w.longest
	w.failed, w.longest = nil, 0
	return failed, longest
}

// fill writes the state, and returns how many keys it has.
func fill(ctx context.Context, client *clientv3.Client) (int, error) {
	batches := *stateMB * 1_000_000 / stateValue / stateBatch
	value := strings.Repeat("v", stateValue)
	next, failed := atomic.Int64{}, make(chan error, writers)
	for range writers {
		go func() {
			failed <- func() error {
				for {
					batch := int(next.Add(1)) - 1
					if batch >= batches {
						return nil
					}
					var puts []clientv3.Op
					for n := range stateBatch {
						puts = append(puts, clientv3.OpPut(fmt.Sprintf("state/%08d", batch*stateBatch+n), value))
					}
					if _, err := client.Txn(ctx).Then(puts...).Commit(); err != nil {
						return fmt.Errorf("while the state is written: %w", err)
					}
				}
			}()
		}()
	}
	for range writers {
		if err := <-failed; err != nil {
			return 0, err
		}
	}
	return batches * stateBatch, nil
}

// leading gives the member that leads.
func leading(ctx context.Context, client *clientv3.Client) (int, error) {
	for member := range members {
		status, err := client.Status(ctx, address(member, 2379))
		if err != nil {
			return 0, err
		}
		if status.Leader == status.Header.MemberId {
			return member, nil
		}
	}
	return 0, fmt.Errorf("no member leads")
}

// killOne kills a member, starts it again when others have written for a while, and judges the writes: of each client so many may fail.
func (w *writing) killOne(c *cluster, member int, who string, each int) error {
	time.Sleep(calm)
	if failed, _ := w.counted(); len(failed) > 0 {
		return fmt.Errorf("%d writes failed before a member was killed, such as: %w", len(failed), failed[0].err)
	}
	before, killed := w.acknowledged.Load(), time.Now()
	if err := c.kill(member); err != nil {
		return err
	}
	time.Sleep(calm)
	begin := time.Now()
	if err := c.start(member); err != nil {
		return err
	}
	if err := c.waitReady(member); err != nil {
		return err
	}
	started := time.Since(begin)
	time.Sleep(calm)
	failed, longest := w.counted()
	kinds, of, newest := map[string]int{}, map[int]int{}, time.Duration(0)
	for _, one := range failed {
		kinds[one.err.Error()]++
		of[one.writer]++
		newest = max(newest, one.begin.Sub(killed))
	}
	fmt.Printf("   %s killed, and started in %d ms: %d writes acknowledged, %d failed, the last of them begun after %d ms, longest pause %d ms\n",
		who, started.Milliseconds(), w.acknowledged.Load()-before, len(failed), newest.Milliseconds(), longest.Milliseconds())
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Printf("   %d failed with: %s\n", kinds[kind], kind)
	}
	if newest > noticed {
		return fmt.Errorf("a write failed that began %d ms after the kill", newest.Milliseconds())
	}
	for number, count := range of {
		if count > each {
			return fmt.Errorf("client %d had %d failed writes, but only %d in flight", number, count, each)
		}
	}
	return nil
}

func roundRobin(ctx context.Context, c *cluster) error {
	begin := time.Now()
	keys, err := fill(ctx, c.client)
	if err != nil {
		return err
	}
	fmt.Printf("   %d MB in %d keys, written in %d s\n", *stateMB, keys, int(time.Since(begin).Seconds()))
	w := &writing{newest: time.Now()}
	for number := range w.writers {
		client, err := connect(nil)
		if err != nil {
			return err
		}
		defer client.Close()
		w.writers[number] = &writer{key: fmt.Sprintf("writer/%d", number), client: client}
	}
	var stop atomic.Bool
	var all sync.WaitGroup
	for number := range w.writers {
		all.Go(func() { w.run(ctx, number, &stop) })
	}
	err = func() error {
		leader, err := leading(ctx, c.client)
		if err != nil {
			return err
		}
		if err := w.killOne(c, (leader+1)%members, "a follower", 1); err != nil {
			return fmt.Errorf("a follower was killed: %w", err)
		}
		if leader, err = leading(ctx, c.client); err != nil {
			return err
		}
		// The one at the leader; then another one, if a member forwarded it to the leader that it did not miss yet.
		if err := w.killOne(c, leader, "the leader", 2); err != nil {
			return fmt.Errorf("the leader was killed: %w", err)
		}
		return nil
	}()
	stop.Store(true)
	all.Wait()
	if err != nil {
		return err
	}
	return w.kept(ctx, keys)
}

// kept looks whether every member has what was acknowledged.
func (w *writing) kept(ctx context.Context, keys int) error {
	for member := range members {
		alone, err := connect(func(config *clientv3.Config) { config.Endpoints = []string{"http://" + address(member, 2379)} })
		if err != nil {
			return err
		}
		defer alone.Close()
		for _, writer := range w.writers {
			answer, err := alone.Get(ctx, writer.key)
			if err != nil {
				return err
			}
			if len(answer.Kvs) != 1 {
				return fmt.Errorf("%s is lost at %s", writer.key, name(member))
			}
			if got, err := strconv.Atoi(string(answer.Kvs[0].Value)); err != nil || got < writer.acknowledged || got > writer.tried {
				return fmt.Errorf("%s is %s at %s, but %d was acknowledged and %d tried", writer.key, answer.Kvs[0].Value, name(member),
					writer.acknowledged, writer.tried)
			}
		}
		answer, err := alone.Get(ctx, "state/", clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithSerializable())
		if err != nil {
			return err
		}
		if err := expect("keys of the state at "+name(member), answer.Count, int64(keys)); err != nil {
			return err
		}
	}
	return nil
}
