// The API server of Kubernetes on three members, while they are killed and started again in turn: what it acknowledges is there, watches tell
// everything once and in order, lists show what was there, and no kind of error appears that it does not also have on etcd.
//
//	go build -o kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver   # ten minutes, once
//	go run . -apiserver ./kube-apiserver -program ../../target/release/quorate -control etcd-3.7
//
// Runs the control first, then the program: the API server boots, clients make, change, list, watch and delete ConfigMaps, each renews a Lease, and
// Events come and go by their time. Prints figures and errors by kind for both. Ends with code 1 if the program broke a promise, or had an
// error that the control had not. Absent: the rest of Kubernetes, and TLS to the members.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"log"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

var (
	program   = flag.String("program", "target/release/quorate", "the server")
	control   = flag.String("control", "etcd-3.7", "what its errors are compared with; a name that begins with etcd is started as etcd")
	apiserver = flag.String("apiserver", "target/programs/kube-apiserver", "Kubernetes' API server")
	kills     = flag.Int("kills", 24, "how often a member is killed, in turn")
	host      = flag.String("host", "127.9.%d.7", "loopback addresses, by member")
	patience  = flag.Duration("patience", 2*time.Minute, "for whatever must happen")
	keep      = flag.Bool("keep", false, "keep the logs")
)

const (
	// Acknowledged writes between the return of a member and the next kill.
	progress = 150
	absence  = 1500 * time.Millisecond
	// The first ones tell enough.
	faultsShown = 20
)

// What a run had to say.
type result struct {
	booted, lasted time.Duration
	crowd          *crowd
	// Of the API server's own log.
	logged map[string]int
	faults []string
}

// boot starts everything, and makes the namespace.
func (s *servers) boot(c *crowd) error {
	for member := range members {
		if err := s.start(member); err != nil {
			return err
		}
	}
	for member := range members {
		if err := s.waitReady(member); err != nil {
			return err
		}
	}
	if err := s.startAPI(*apiserver); err != nil {
		return err
	}
	return until("readiness of the API server", func() error {
		body, err := c.open(c.using, http.MethodGet, "/readyz", nil)
		if err != nil {
			return err
		}
		_ = body.Close()
		made := object{APIVersion: "v1", Kind: "Namespace", Metadata: metadata{Name: namespace}}
		return c.call(http.MethodPost, "/api/v1/namespaces", &made, &made)
	})
}

func (s *servers) killInTurn(c *crowd) error {
	for n := range *kills {
		before := c.acknowledged()
		err := until(fmt.Sprintf("progress before kill %d", n), func() error {
			if c.acknowledged() < before+progress {
				return fmt.Errorf("%d writes were acknowledged", c.acknowledged()-before)
			}
			return nil
		})
		if err != nil {
			return err
		}
		member := n % members
		if err := s.kill(member); err != nil {
			return err
		}
		time.Sleep(absence)
		if err := errors.Join(s.start(member), s.waitReady(member)); err != nil {
			return err
		}
	}
	return nil
}

func run(program, dir string) (*result, error) {
	s, c := &servers{dir: dir, program: program}, newCrowd()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	defer s.stop()
	begin := time.Now()
	if err := s.boot(c); err != nil {
		return nil, err
	}
	got := &result{booted: time.Since(begin), crowd: c}
	if err := c.begin(); err != nil {
		return nil, err
	}
	if err := s.killInTurn(c); err != nil {
		return nil, err
	}
	if err := c.end(); err != nil {
		return nil, err
	}
	// In pages, from the members, and from the cache.
	for _, of := range []resource{configMaps, leases, events} {
		for _, limit := range []int{0, pageObjects} {
			shown, err := c.list(of, limit)
			if err != nil {
				return nil, err
			}
			c.listings = append(c.listings, shown)
		}
	}
	c.unwatch()
	c.follows.Wait()
	got.faults = c.judge()
	if err := sameHash(); err != nil {
		got.faults = append(got.faults, err.Error())
	}
	got.lasted = time.Since(begin)
	var err error
	got.logged, err = loggedErrors(s.log("apiserver"))
	return got, err
}

var loggedError = regexp.MustCompile(`^E\d+ \S+ +\d+ (\S+?):\d+\] (.*)`)

// loggedErrors counts the errors of the API server's log by kind.
func loggedErrors(file string) (map[string]int, error) {
	read, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer read.Close()
	kinds := map[string]int{}
	lines := bufio.NewScanner(read)
	lines.Buffer(nil, 10_000_000)
	for lines.Scan() {
		if found := loggedError.FindStringSubmatch(lines.Text()); found != nil {
			kinds[kindOf("log: "+found[1]+": "+found[2])]++
		}
	}
	return kinds, lines.Err()
}

func (r *result) print(of string) {
	made, kinds := map[string]int{}, map[string]int{}
	for _, one := range r.crowd.writes {
		if one.acknowledged {
			made[one.of.plural+" "+one.verb]++
		}
	}
	fmt.Printf("%s: booted in %.1f s, %d kills, %.0f s in all, longest time without an acknowledged write %.1f s\n", of, r.booted.Seconds(), *kills,
		r.lasted.Seconds(), r.crowd.longest.Seconds())
	for _, what := range slices.Sorted(maps.Keys(made)) {
		fmt.Printf("  %6d  %s\n", made[what], what)
	}
	watches, told := 0, 0
	for _, w := range r.crowd.watchers {
		watches, told = watches+w.watches, told+len(w.told)
	}
	fmt.Printf("  %6d  events told to %d watchers in %d watches; %d lists\n", told, len(r.crowd.watchers), watches, len(r.crowd.listings))
	maps.Copy(kinds, r.crowd.errors)
	maps.Copy(kinds, r.logged)
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Printf("  %6d  error %s\n", kinds[kind], kind)
	}
	for _, fault := range r.faults[:min(len(r.faults), faultsShown)] {
		fmt.Printf("  FAULT: %s\n", fault)
	}
}

// saying gives what an error says, whatever was asked: a killed member meets one kind of call or another.
func saying(kind string) string {
	_, said, _ := strings.Cut(kind, ": ")
	return said
}

func main() {
	flag.Parse()
	dir, err := os.MkdirTemp("", "quorate-kubernetes-")
	if err != nil {
		log.Fatal(err)
	}
	var results []*result
	for n, program := range []string{*control, *program} {
		got, err := run(program, filepath.Join(dir, fmt.Sprint(n)))
		if err != nil {
			log.Fatalf("%s: %v\nthe logs are in %s", program, err, dir)
		}
		got.print(program)
		results = append(results, got)
	}
	theirs, ours := results[0], results[1]
	failed := len(ours.faults) > 0
	known := map[string]bool{}
	for kind := range theirs.crowd.errors {
		known[saying(kind)] = true
	}
	for kind := range ours.crowd.errors {
		if !known[saying(kind)] {
			failed = true
			fmt.Printf("only on %s: %s\n", *program, kind)
		}
	}
	if failed {
		log.Fatalf("%s is not as it must be; the logs are in %s", *program, dir)
	}
	if !*keep {
		_ = os.RemoveAll(dir)
	}
	fmt.Println("nothing is missing, and no error that the control has not")
}
