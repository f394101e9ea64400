// What etcd's own Go client brings beside its calls: locks, elections, STM, leasing, ordering, mirrors, names, namespaces, Kubernetes' interface,
// users; and what it does while members die: watches and sessions that go on, writes that fail, RequireLeader.
//
//	go run . -program ../../target/release/quorate
//
// Starts three members with etcd's command line (-program may be an etcd as well), runs every case and prints a line for each. Ends with
// code 1 at the first that is not as etcd's documentation says. Absent: many of anything, and many restarts (../watchers).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const members = 3

var (
	program  = flag.String("program", "target/release/quorate", "the server; with the name etcd it is started without the word etcd")
	host     = flag.String("host", "127.9.%d.8", "loopback addresses, by member")
	patience = flag.Duration("patience", 30*time.Second, "for whatever must happen")
	stateMB  = flag.Int("state-mb", 0, "also kill a member of those that have so many values, among clients that write round robin")
	only     = flag.String("only", "", "run the cases with this text in their name")
)

// A case fails by its error.
type testCase struct {
	name string
	run  func(context.Context, *cluster) error
}

var cases = []testCase{
	{"a lock has one holder, and passes on", lock},
	{"a leader is elected, observed and replaced", election},
	{"concurrent transfers by STM lose nothing", transfers},
	{"a leasing client sees what another one writes", leasingClients},
	{"reads in order never go back, whatever member answers", ordered},
	{"a mirror has every key and every change", mirrored},
	{"endpoints are resolved by gRPC, and watched", naming},
	{"a namespace hides its prefix", namespaces},
	{"optimistic writes of Kubernetes' interface meet", kubernetesClient},
	{"a streamed range is the range", streamed},
	{"a client with a password goes on over tokens that end", users},
	{"maintenance is answered", maintenance},
	{"watches and sessions go on while each member is killed", restarts},
	{"RequireLeader ends a watch without a quorum, and nothing else does", requireLeader},
}

type cluster struct {
	dir     string
	running [members]*exec.Cmd
	client  *clientv3.Client
}

func address(member, port int) string {
	return fmt.Sprintf("%s:%d", fmt.Sprintf(*host, member), port)
}

func memberEndpoints() (all []string) {
	for member := range members {
		all = append(all, address(member, 2379))
	}
	return all
}

func name(member int) string { return fmt.Sprintf("m%d", member) }

// start starts a member on its disk.
func (c *cluster) start(member int) error {
	var list []string
	for other := range members {
		list = append(list, fmt.Sprintf("%s=http://%s", name(other), address(other, 2380)))
	}
	out, err := os.OpenFile(filepath.Join(c.dir, name(member)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	client, peer := "http://"+address(member, 2379), "http://"+address(member, 2380)
	args := []string{"--name", name(member), "--data-dir", filepath.Join(c.dir, name(member)), "--initial-cluster", strings.Join(list, ","),
		"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--auth-token-ttl", "2"}
	if !strings.HasPrefix(filepath.Base(*program), "etcd") {
		args = append([]string{"etcd"}, args...)
	}
	command := exec.Command(*program, args...)
	command.Stderr = out
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.running[member] = command
	return command.Start()
}

// kill ends a member as a power loss would.
func (c *cluster) kill(member int) error {
	if err := c.running[member].Process.Kill(); err != nil {
		return err
	}
	_ = c.running[member].Wait()
	return nil
}

func (c *cluster) waitReady(member int) error {
	return until("readiness of "+name(member), func() error {
		answer, err := http.Get("http://" + address(member, 2379) + "/readyz")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", answer.Status)
		}
		return nil
	})
}

func connect(change func(*clientv3.Config)) (*clientv3.Client, error) {
	// It would log every call that it tries again.
	config := clientv3.Config{Endpoints: memberEndpoints(), DialTimeout: 5 * time.Second, Logger: zap.NewNop()}
	if change != nil {
		change(&config)
	}
	return clientv3.New(config)
}

// until waits for a condition, and says what it was if it does not come.
func until(what string, holds func() error) error {
	begin := time.Now()
	for {
		err := holds()
		if err == nil {
			return nil
		}
		if time.Since(begin) > *patience {
			return fmt.Errorf("%s did not happen: %w", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// expect compares what was got with what must be.
func expect[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s: got %v, expected %v", what, got, want)
	}
	return nil
}

func run(c *cluster) error {
	for member := range members {
		if err := c.start(member); err != nil {
			return err
		}
	}
	for member := range members {
		if err := c.waitReady(member); err != nil {
			return err
		}
	}
	client, err := connect(nil)
	if err != nil {
		return err
	}
	c.client = client
	defer client.Close()
	for _, one := range cases {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 2**patience)
		err := one.run(ctx, c)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", one.name, err)
		}
		fmt.Printf("ok %4d ms  %s\n", time.Since(begin).Milliseconds(), one.name)
	}
	return nil
}

func main() {
	flag.Parse()
	if *stateMB > 0 {
		cases = append(cases, testCase{"a killed member costs at most the writes in flight, and its return none", roundRobin})
	}
	cases = slices.DeleteFunc(cases, func(one testCase) bool { return !strings.Contains(one.name, *only) })
	dir, err := os.MkdirTemp("", "quorate-clientv3-")
	if err != nil {
		log.Fatal(err)
	}
	c := &cluster{dir: dir}
	err = run(c)
	for _, command := range c.running {
		if command != nil {
			_ = command.Process.Kill()
		}
	}
	if err != nil {
		log.Fatalf("%v\nthe members' logs are in %s", err, dir)
	}
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d cases passed\n", len(cases))
}
