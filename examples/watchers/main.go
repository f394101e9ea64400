// Watchers of etcd's own Go client, without RequireLeader, over restarts of every member: none may end, miss a write, or see one twice.
//
//	go run . -program ../../target/release/quorate -members 3 -rounds 20 -watchers 30
//
// A round restarts each member in turn, with SIGTERM, and waits until it is ready and every key was written again. Ends with code 1 if a
// watcher's channel ended, or told an error, or if what it told is not what was written.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

var (
	program  = flag.String("program", "target/release/quorate", "the server")
	members  = flag.Int("members", 3, "members of the cluster")
	rounds   = flag.Int("rounds", 20, "restarts of each member")
	watchers = flag.Int("watchers", 30, "watchers, ten to a client")
	host     = flag.String("host", "127.9.%d.9", "loopback addresses, by member")
	patience = flag.Duration("patience", time.Minute, "for whatever must happen")
)

func address(member, port int) string {
	return fmt.Sprintf("%s:%d", fmt.Sprintf(*host, member), port)
}

func endpoints() (all []string) {
	for member := range *members {
		all = append(all, address(member, 2379))
	}
	return all
}

// start starts a member, on its disk below dir.
func start(dir string, member int) *exec.Cmd {
	name := fmt.Sprintf("kv-%d", member)
	out, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(err)
	defer out.Close()
	command := exec.Command(*program, "serve", "--name", name, "--peers", *host+":2380", "--size", fmt.Sprint(*members),
		"--listen-peer", address(member, 2380), "--listen-client", address(member, 2379),
		"--advertise-client", "http://"+address(member, 2379), "--data-dir", filepath.Join(dir, name))
	command.Stderr = out
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(command.Start())
	return command
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// until waits for a condition, and says what it was if it does not come.
func until(what string, holds func() error) {
	begin := time.Now()
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Since(begin) > *patience {
			log.Fatalf("%s did not happen: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func ready(member int) error {
	answer, err := http.Get("http://" + address(member, 2381) + "/readyz")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(answer.Body)
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", text)
	}
	return nil
}

// follow counts what a watcher is told of a key whose values are 0, 1, 2 and so on.
func follow(key string, told clientv3.WatchChan, next *atomic.Int64) {
	for answer := range told {
		if err := answer.Err(); err != nil {
			log.Fatalf("the watcher of %s was told %v after %d writes", key, err, next.Load())
		}
		for _, event := range answer.Events {
			if expected := fmt.Sprint(next.Load()); string(event.Kv.Value) != expected {
				log.Fatalf("the watcher of %s was told %s, expected %s", key, event.Kv.Value, expected)
			}
			next.Add(1)
		}
	}
	log.Fatalf("the watcher of %s has ended after %d writes", key, next.Load())
}

// write writes a key's next value until it is done; one whose fate is unknown is read.
func write(client *clientv3.Client, key string, value int64) {
	want := fmt.Sprint(value)
	until("a write of "+key, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		// Only once, whatever became of the try before.
		_, err := client.Txn(ctx).If(clientv3.Compare(clientv3.Value(key), "!=", want)).Then(clientv3.OpPut(key, want)).Commit()
		return err
	})
}

func main() {
	flag.Parse()
	dir, err := os.MkdirTemp("", "quorate-watchers-")
	check(err)
	running := make([]*exec.Cmd, *members)
	for member := range running {
		running[member] = start(dir, member)
	}
	for member := range running {
		until(fmt.Sprintf("readiness of member %d", member), func() error { return ready(member) })
	}
	client := func() *clientv3.Client {
		// It would log every write that it tries again.
		config := clientv3.Config{Endpoints: endpoints(), DialTimeout: 5 * time.Second, Logger: zap.NewNop()}
		client, err := clientv3.New(config)
		check(err)
		return client
	}
	// A value before it is compared with: a key that does not exist has none.
	writer, told, written := client(), make([]atomic.Int64, *watchers), make([]atomic.Int64, *watchers)
	var follower *clientv3.Client
	for i := range *watchers {
		if i%10 == 0 {
			follower = client()
		}
		key := fmt.Sprintf("watched/%d", i)
		put, err := writer.Put(context.Background(), key, "0")
		check(err)
		written[i].Store(1)
		go follow(key, follower.Watch(context.Background(), key, clientv3.WithRev(put.Header.Revision)), &told[i])
	}
	var stop atomic.Bool
	var writers sync.WaitGroup
	for i := range *watchers {
		writers.Go(func() {
			for !stop.Load() {
				write(writer, fmt.Sprintf("watched/%d", i), written[i].Load())
				written[i].Add(1)
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	for round := range *rounds {
		for member := range running {
			check(running[member].Process.Signal(syscall.SIGTERM))
			if err := running[member].Wait(); err != nil {
				log.Fatalf("member %d ended with %v in round %d; its log is in %s", member, err, round, dir)
			}
			running[member] = start(dir, member)
			until(fmt.Sprintf("readiness of member %d", member), func() error { return ready(member) })
			for i := range *watchers {
				before := written[i].Load()
				until(fmt.Sprintf("a write of key %d", i), func() error {
					if written[i].Load() == before {
						return fmt.Errorf("none in round %d", round)
					}
					return nil
				})
			}
		}
	}
	stop.Store(true)
	writers.Wait()
	var all int64
	for i := range *watchers {
		until(fmt.Sprintf("all %d writes of key %d", written[i].Load(), i), func() error {
			if seen := told[i].Load(); seen != written[i].Load() {
				return fmt.Errorf("%d were told", seen)
			}
			return nil
		})
		all += written[i].Load()
	}
	for _, command := range running {
		check(command.Process.Kill())
	}
	check(os.RemoveAll(dir))
	fmt.Printf("%d watchers of %d members over %d restarts of each: none has ended; %d writes, each told once\n",
		*watchers, *members, *rounds, all)
}
