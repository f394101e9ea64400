// Cases in which every member lives.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"go.etcd.io/etcd/client/v3/ordering"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func lock(ctx context.Context, c *cluster) error {
	first, err := concurrency.NewSession(c.client, concurrency.WithTTL(10))
	if err != nil {
		return err
	}
	second, err := concurrency.NewSession(c.client, concurrency.WithTTL(10))
	if err != nil {
		return err
	}
	defer second.Close()
	held, wanted := concurrency.NewMutex(first, "lock"), concurrency.NewMutex(second, "lock")
	if err := held.Lock(ctx); err != nil {
		return err
	}
	if err := wanted.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
		return fmt.Errorf("a held lock was tried: %v", err)
	}
	got := make(chan error, 1)
	go func() { got <- wanted.Lock(ctx) }()
	// Who ends gives up what was locked.
	if err := first.Close(); err != nil {
		return err
	}
	if err := <-got; err != nil {
		return err
	}
	answer, err := c.client.Txn(ctx).If(wanted.IsOwner()).Then(clientv3.OpPut("locked", "1")).Commit()
	if err != nil {
		return err
	}
	return errors.Join(expect("the second is the owner", answer.Succeeded, true), wanted.Unlock(ctx))
}

func election(ctx context.Context, c *cluster) error {
	first, err := concurrency.NewSession(c.client)
	if err != nil {
		return err
	}
	second, err := concurrency.NewSession(c.client)
	if err != nil {
		return err
	}
	defer first.Close()
	defer second.Close()
	leads, follows := concurrency.NewElection(first, "election"), concurrency.NewElection(second, "election")
	observing, stop := context.WithCancel(ctx)
	defer stop()
	if err := leads.Campaign(ctx, "a"); err != nil {
		return err
	}
	observed := follows.Observe(observing)
	campaign := make(chan error, 1)
	go func() { campaign <- follows.Campaign(ctx, "b") }()
	for _, want := range []string{"a", "c", "b"} {
		select {
		case seen := <-observed:
			if err := expect("the leader", string(seen.Kvs[0].Value), want); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("%s was not observed: %w", want, ctx.Err())
		}
		switch want {
		case "a":
			err = leads.Proclaim(ctx, "c")
		case "c":
			err = leads.Resign(ctx)
		}
		if err != nil {
			return err
		}
	}
	return <-campaign
}

func transfers(ctx context.Context, c *cluster) error {
	const accounts, each, workers, rounds = 5, 100, 8, 15
	// At one member: after its first read STM reads what the asked member has, at that revision, and fails where it is not applied yet.
	client, err := connect(func(config *clientv3.Config) { config.Endpoints = config.Endpoints[:1] })
	if err != nil {
		return err
	}
	defer client.Close()
	key := func(account int) string { return fmt.Sprintf("account/%d", account) }
	for account := range accounts {
		if _, err := client.Put(ctx, key(account), strconv.Itoa(each)); err != nil {
			return err
		}
	}
	var all sync.WaitGroup
	failures := make(chan error, workers)
	for worker := range workers {
		all.Go(func() {
			for round := range rounds {
				from, to := key((worker+round)%accounts), key((worker+2*round+1)%accounts)
				if from == to {
					continue
				}
				_, err := concurrency.NewSTM(client, func(stm concurrency.STM) error {
					left, _ := strconv.Atoi(stm.Get(from))
					right, _ := strconv.Atoi(stm.Get(to))
					stm.Put(from, strconv.Itoa(left-1))
					stm.Put(to, strconv.Itoa(right+1))
					return nil
				}, concurrency.WithAbortContext(ctx))
				if err != nil {
					failures <- err
					return
				}
			}
		})
	}
	all.Wait()
	close(failures)
	if err := <-failures; err != nil {
		return err
	}
	answer, err := client.Get(ctx, "account/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	sum := 0
	for _, kv := range answer.Kvs {
		value, _ := strconv.Atoi(string(kv.Value))
		sum += value
	}
	return expect("the sum of all accounts", sum, accounts*each)
}

func leasingClients(ctx context.Context, c *cluster) error {
	first, closeFirst, err := leasing.NewKV(c.client, "leasing/")
	if err != nil {
		return err
	}
	defer closeFirst()
	other, err := connect(nil)
	if err != nil {
		return err
	}
	defer other.Close()
	second, closeSecond, err := leasing.NewKV(other, "leasing/")
	if err != nil {
		return err
	}
	defer closeSecond()
	for round := range 10 {
		want := strconv.Itoa(round)
		if _, err := second.Put(ctx, "leased", want); err != nil {
			return err
		}
		// The second of these is answered from what the first has brought.
		for range 2 {
			answer, err := first.Get(ctx, "leased")
			if err != nil {
				return err
			}
			if err := expect("what the other has written", string(answer.Kvs[0].Value), want); err != nil {
				return err
			}
		}
	}
	return nil
}

func ordered(ctx context.Context, c *cluster) error {
	kv := ordering.NewKV(c.client, ordering.NewOrderViolationSwitchEndpointClosure(c.client))
	newest := 0
	for round := range 300 {
		if _, err := c.client.Put(ctx, "ordered", strconv.Itoa(round)); err != nil {
			return err
		}
		answer, err := kv.Get(ctx, "ordered", clientv3.WithSerializable())
		if errors.Is(err, ordering.ErrNoGreaterRev) {
			// It gives up after fifteen answers that are old, ever.
			kv = ordering.NewKV(c.client, ordering.NewOrderViolationSwitchEndpointClosure(c.client))
			continue
		}
		if err != nil {
			return err
		}
		if len(answer.Kvs) == 0 {
			continue
		}
		seen, _ := strconv.Atoi(string(answer.Kvs[0].Value))
		if seen < newest {
			return fmt.Errorf("read %d after %d", seen, newest)
		}
		newest = seen
	}
	return nil
}

func mirrored(ctx context.Context, c *cluster) error {
	const keys = 2500
	put := func(from, to int) error {
		for begin := from; begin < to; begin += 100 {
			var ops []clientv3.Op
			for key := begin; key < begin+100; key++ {
				ops = append(ops, clientv3.OpPut(fmt.Sprintf("mirror/%d", key), "v"))
			}
			if _, err := c.client.Txn(ctx).Then(ops...).Commit(); err != nil {
				return err
			}
		}
		return nil
	}
	if err := put(0, keys); err != nil {
		return err
	}
	syncer := mirror.NewSyncer(c.client, "mirror/", 0)
	base, failed := syncer.SyncBase(ctx)
	have := map[string]bool{}
	for answer := range base {
		for _, kv := range answer.Kvs {
			have[string(kv.Key)] = true
		}
	}
	if err := <-failed; err != nil {
		return err
	}
	if err := expect("keys of the base", len(have), keys); err != nil {
		return err
	}
	following, stop := context.WithCancel(ctx)
	defer stop()
	updates := syncer.SyncUpdates(following)
	if err := put(keys, keys+200); err != nil {
		return err
	}
	for len(have) < keys+200 {
		select {
		case answer := <-updates:
			if err := answer.Err(); err != nil {
				return err
			}
			for _, event := range answer.Events {
				have[string(event.Kv.Key)] = true
			}
		case <-ctx.Done():
			return fmt.Errorf("%d keys: %w", len(have), ctx.Err())
		}
	}
	return nil
}

func naming(ctx context.Context, c *cluster) error {
	manager, err := endpoints.NewManager(c.client, "service")
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	seen, err := manager.NewWatchChannel(watching)
	if err != nil {
		return err
	}
	lease, err := c.client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	// A member itself is the service that is called.
	endpoint := endpoints.Endpoint{Addr: address(1, 2379)}
	if err := manager.AddEndpoint(ctx, "service/1", endpoint, clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	if err := expect("updates", len(<-seen), 1); err != nil {
		return err
	}
	builder, err := resolver.NewBuilder(c.client)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient("etcd:///service", grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	health := grpc_health_v1.NewHealthClient(connection)
	if _, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		return err
	}
	if _, err := c.client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	updates := <-seen
	return expect("what ended with its lease", updates[0].Op, endpoints.Delete)
}

func namespaces(ctx context.Context, c *cluster) error {
	kv, watcher := namespace.NewKV(c.client.KV, "space/"), namespace.NewWatcher(c.client.Watcher, "space/")
	watching, stop := context.WithCancel(ctx)
	defer stop()
	told := watcher.Watch(watching, "", clientv3.WithPrefix(), clientv3.WithRev(1))
	if _, err := kv.Put(ctx, "key", "v"); err != nil {
		return err
	}
	outside, err := c.client.Get(ctx, "space/key")
	if err != nil {
		return err
	}
	event := <-told
	if err := event.Err(); err != nil {
		return err
	}
	return errors.Join(
		expect("keys outside", len(outside.Kvs), 1),
		expect("the key inside", string(event.Events[0].Kv.Key), "key"),
	)
}

func kubernetesClient(ctx context.Context, c *cluster) error {
	client, err := kubernetes.New(clientv3.Config{Endpoints: memberEndpoints(), DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer client.Close()
	made, err := client.Kubernetes.OptimisticPut(ctx, "/registry/pods/a", []byte("1"), 0, kubernetes.PutOptions{})
	if err != nil {
		return err
	}
	again, err := client.Kubernetes.OptimisticPut(ctx, "/registry/pods/a", []byte("2"), 0, kubernetes.PutOptions{GetOnFailure: true})
	if err != nil {
		return err
	}
	changed, err := client.Kubernetes.OptimisticPut(ctx, "/registry/pods/a", []byte("2"), made.Revision, kubernetes.PutOptions{})
	if err != nil {
		return err
	}
	list, err := client.Kubernetes.List(ctx, "/registry/pods/", kubernetes.ListOptions{Limit: 1})
	if err != nil {
		return err
	}
	count, err := client.Kubernetes.Count(ctx, "/registry/pods/", kubernetes.CountOptions{})
	if err != nil {
		return err
	}
	gone, err := client.Kubernetes.OptimisticDelete(ctx, "/registry/pods/a", changed.Revision, kubernetes.DeleteOptions{})
	if err != nil {
		return err
	}
	return errors.Join(
		expect("the first put", made.Succeeded, true),
		expect("a put of what is there", again.Succeeded, false),
		expect("what is there", string(again.KV.Value), "1"),
		expect("listed", string(list.Kvs[0].Value), "2"),
		expect("the list's revision", list.Revision, changed.Revision),
		expect("counted", count, 1),
		expect("deleted", gone.Succeeded, true),
	)
}

func streamed(ctx context.Context, c *cluster) error {
	whole, err := c.client.Get(ctx, "mirror/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	pieces, err := c.client.GetStream(ctx, "mirror/", clientv3.WithPrefix(), clientv3.WithRev(whole.Header.Revision))
	if err != nil {
		return err
	}
	place := 0
	for piece := range pieces {
		if err := piece.Err(); err != nil {
			return err
		}
		for _, kv := range piece.Kvs {
			if err := expect("the next key", string(kv.Key), string(whole.Kvs[place].Key)); err != nil {
				return err
			}
			place++
		}
	}
	return expect("keys", place, len(whole.Kvs))
}

func users(ctx context.Context, c *cluster) error {
	for _, step := range []func() error{
		func() error { _, err := c.client.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := c.client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.client.UserAdd(ctx, "reader", "pass"); return err },
		func() error { _, err := c.client.RoleAdd(ctx, "reads"); return err },
		func() error {
			read := clientv3.PermissionType(clientv3.PermRead)
			_, err := c.client.RoleGrantPermission(ctx, "reads", "open/", clientv3.GetPrefixRangeEnd("open/"), read)
			return err
		},
		func() error { _, err := c.client.UserGrantRole(ctx, "reader", "reads"); return err },
		func() error { _, err := c.client.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	as := func(user, password string) (*clientv3.Client, error) {
		return connect(func(config *clientv3.Config) { config.Username, config.Password = user, password })
	}
	root, err := as("root", "secret")
	if err != nil {
		return err
	}
	defer root.Close()
	reader, err := as("reader", "pass")
	if err != nil {
		return err
	}
	defer reader.Close()
	_, refused := reader.Put(ctx, "open/key", "v")
	_, wrong := as("reader", "wrong")
	begin := time.Now()
	// Tokens end after two seconds without use.
	for _, pause := range []time.Duration{0, 3 * time.Second} {
		time.Sleep(pause)
		if _, err := reader.Get(ctx, "open/key"); err != nil {
			return fmt.Errorf("a read after %v: %w", time.Since(begin), err)
		}
	}
	_, err = root.AuthDisable(ctx)
	return errors.Join(
		err,
		expect("a write by who may read", fmt.Sprint(refused), "etcdserver: permission denied"),
		expect("a wrong password", fmt.Sprint(wrong), "etcdserver: authentication failed, invalid user ID or password"),
	)
}

func maintenance(ctx context.Context, c *cluster) error {
	var leader, follower uint64
	for _, endpoint := range c.client.Endpoints() {
		status, err := c.client.Status(ctx, endpoint)
		if err != nil {
			return err
		}
		leader = status.Leader
		if status.Header.MemberId != leader {
			follower = status.Header.MemberId
		}
		if _, err := c.client.HashKV(ctx, endpoint, 0); err != nil {
			return err
		}
		if _, err := c.client.Defragment(ctx, endpoint); err != nil {
			return err
		}
	}
	snapshot, err := c.client.SnapshotWithVersion(ctx)
	if err != nil {
		return err
	}
	bytes, err := io.Copy(io.Discard, snapshot.Snapshot)
	if err != nil {
		return err
	}
	for _, endpoint := range c.client.Endpoints() {
		one, err := connect(func(config *clientv3.Config) { config.Endpoints = []string{endpoint} })
		if err != nil {
			return err
		}
		defer one.Close()
		if status, err := one.Status(ctx, endpoint); err != nil {
			return err
		} else if status.Header.MemberId != leader {
			continue
		}
		if _, err := one.MoveLeader(ctx, follower); err != nil {
			return err
		}
	}
	status, err := c.client.Status(ctx, c.client.Endpoints()[0])
	if err != nil {
		return err
	}
	list, err := c.client.MemberList(ctx)
	if err != nil {
		return err
	}
	return errors.Join(
		expect("the leader", status.Leader, follower),
		expect("members", len(list.Members), members),
		// A checksum is behind sectors.
		expect("the snapshot's size in sectors, and the rest", bytes%512, 32),
	)
}
