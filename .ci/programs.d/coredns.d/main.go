// CoreDNS with its plugin for etcd, in this process: names are resolved from keys, and follow them. `coredns ENDPOINT...`. Ends with code 1 at an
// answer that is not as it must be.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/coredns/caddy"
	_ "github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/etcd"
	"github.com/miekg/dns"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	server   = "127.0.0.1:1053"
	patience = 20 * time.Second
)

// ask gives the answers to a question, each in a line.
func ask(name string, kind uint16) (string, error) {
	question := new(dns.Msg)
	question.SetQuestion(name, kind)
	answer, err := dns.Exchange(question, server)
	if err != nil {
		return "", err
	}
	if len(answer.Answer) == 0 {
		return dns.RcodeToString[answer.Rcode], nil
	}
	var lines []string
	for _, record := range answer.Answer {
		lines = append(lines, strings.TrimPrefix(record.String(), record.Header().String()))
	}
	return strings.Join(lines, "\n"), nil
}

func expect(name string, kind uint16, want string) error {
	begin := time.Now()
	for {
		got, err := ask(name, kind)
		if err == nil && got == want {
			return nil
		}
		if time.Since(begin) > patience {
			return fmt.Errorf("%s %s: got %q and %v, expected %q", name, dns.TypeToString[kind], got, err, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func run(endpoints []string) error {
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	corefile := fmt.Sprintf("skydns.test:1053 {\n errors\n etcd {\n path /skydns\n endpoint http://%s\n }\n}\n", strings.Join(endpoints, " http://"))
	instance, err := caddy.Start(caddy.CaddyfileInput{Contents: []byte(corefile), Filepath: "Corefile", ServerTypeName: "dns"})
	if err != nil {
		return err
	}
	defer func() { _ = instance.Stop() }()
	put := func(key, value string) error {
		_, err := client.Put(ctx, "/skydns/test/skydns/"+key, value)
		return err
	}
	if err := put("web/a", `{"host":"10.0.0.1","port":8080,"ttl":60}`); err != nil {
		return err
	}
	if err := put("text", `{"text":"from a key"}`); err != nil {
		return err
	}
	lease, err := client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, "/skydns/test/skydns/leased", `{"host":"10.0.0.9"}`, clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return expect("a.web.skydns.test.", dns.TypeA, "10.0.0.1") },
		func() error { return expect("web.skydns.test.", dns.TypeSRV, "10 100 8080 a.web.skydns.test.") },
		func() error { return expect("text.skydns.test.", dns.TypeTXT, `"from a key"`) },
		func() error { return expect("none.skydns.test.", dns.TypeA, "NXDOMAIN") },
		func() error { return expect("leased.skydns.test.", dns.TypeA, "10.0.0.9") },
		func() error { return put("web/a", `{"host":"10.0.0.2","port":8080,"ttl":60}`) },
		func() error { return expect("a.web.skydns.test.", dns.TypeA, "10.0.0.2") },
		func() error { _, err := client.Revoke(ctx, lease.ID); return err },
		func() error { return expect("leased.skydns.test.", dns.TypeA, "NXDOMAIN") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		log.Fatal(err)
	}
	fmt.Println("answers followed the keys: passed")
}
