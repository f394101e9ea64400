// What is run: three members, which are killed and started again, and an API server on them.
package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	members = 3
	token   = "admin"
	// How long an Event lives.
	eventTTL = 30 * time.Second
)

type servers struct {
	dir       string
	program   string
	running   [members]*exec.Cmd
	apiserver *exec.Cmd
}

func address(member, port int) string {
	return fmt.Sprintf("%s:%d", fmt.Sprintf(*host, member), port)
}

// apiAddress is that of the API server, beside the members'.
func apiAddress() string { return address(members, 6443) }

func name(member int) string { return fmt.Sprintf("m%d", member) }

// spawn starts a program that ends with this one, and writes into a file of its own.
func (s *servers) spawn(as, program string, args []string) (*exec.Cmd, error) {
	out, err := os.OpenFile(s.log(as), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	command := exec.Command(program, args...)
	command.Stdout, command.Stderr = out, out
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return command, command.Start()
}

func (s *servers) log(of string) string { return filepath.Join(s.dir, of+".log") }

// start starts a member on its disk, with the flags of an etcd.
func (s *servers) start(member int) (err error) {
	var list []string
	for other := range members {
		list = append(list, fmt.Sprintf("%s=http://%s", name(other), address(other, 2380)))
	}
	client, peer := "http://"+address(member, 2379), "http://"+address(member, 2380)
	args := []string{"--name", name(member), "--data-dir", filepath.Join(s.dir, name(member)), "--initial-cluster", strings.Join(list, ","),
		"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer}
	if !strings.HasPrefix(filepath.Base(s.program), "etcd") {
		args = append([]string{"etcd"}, args...)
	}
	s.running[member], err = s.spawn(name(member), s.program, args)
	return err
}

// kill ends a member as a power loss would.
func (s *servers) kill(member int) error {
	if err := s.running[member].Process.Kill(); err != nil {
		return err
	}
	_ = s.running[member].Wait()
	return nil
}

func (s *servers) waitReady(member int) error {
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

// startAPI starts the API server. It makes its certificate by itself.
func (s *servers) startAPI(program string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	encoded := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	keyFile, tokens := filepath.Join(s.dir, "accounts.pem"), filepath.Join(s.dir, "tokens")
	if err := os.WriteFile(keyFile, encoded, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(tokens, []byte(token+",admin,1,system:masters\n"), 0o600); err != nil {
		return err
	}
	var endpoints []string
	for member := range members {
		endpoints = append(endpoints, "http://"+address(member, 2379))
	}
	bind, port, _ := strings.Cut(apiAddress(), ":")
	s.apiserver, err = s.spawn("apiserver", program, []string{"--etcd-servers", strings.Join(endpoints, ","),
		"--bind-address", bind, "--secure-port", port, "--cert-dir", filepath.Join(s.dir, "certificates"),
		// Only told to others; one of this machine's own would be refused.
		"--advertise-address", "10.77.0.1",
		"--token-auth-file", tokens, "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.96.0.0/16",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", keyFile,
		"--service-account-signing-key-file", keyFile,
		// More often than in life, so that they happen here.
		"--etcd-compaction-interval", "30s", "--event-ttl", eventTTL.String()})
	return err
}

// sameHash waits until all members have the same state, by their own word.
func sameHash() error {
	return until("equal hashes", func() error {
		seen := map[string]bool{}
		for member := range members {
			answer, err := http.Post("http://"+address(member, 2379)+"/v3/maintenance/hashkv", "application/json", bytes.NewBufferString("{}"))
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			var hash struct {
				Hash   json.Number
				Header struct{ Revision string }
			}
			if err := json.NewDecoder(answer.Body).Decode(&hash); err != nil {
				return err
			}
			seen[fmt.Sprintf("%s at revision %s", hash.Hash, hash.Header.Revision)] = true
		}
		if len(seen) != 1 {
			return fmt.Errorf("they are %v", seen)
		}
		return nil
	})
}

func (s *servers) stop() {
	for _, command := range append(s.running[:], s.apiserver) {
		if command != nil {
			_ = command.Process.Kill()
			_ = command.Wait()
		}
	}
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
		time.Sleep(50 * time.Millisecond)
	}
}
