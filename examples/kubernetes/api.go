// Calls of the API server, as JSON, and their errors by kind.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"
)

const (
	namespace = "load"
	// The API server gives up a request after a minute, and is to say so itself.
	callPatience = 70 * time.Second
)

// A resource is a kind of object, and where it is.
type resource struct {
	group, version, plural, kind string
}

var (
	configMaps = resource{"", "v1", "configmaps", "ConfigMap"}
	events     = resource{"", "v1", "events", "Event"}
	leases     = resource{"coordination.k8s.io", "v1", "leases", "Lease"}
)

func (r resource) path() string {
	if r.group == "" {
		return "/api/" + r.version + "/namespaces/" + namespace + "/" + r.plural
	}
	return "/apis/" + r.group + "/" + r.version + "/namespaces/" + namespace + "/" + r.plural
}

// An object, with the fields that are written here.
type object struct {
	APIVersion string            `json:"apiVersion,omitempty"`
	Kind       string            `json:"kind,omitempty"`
	Metadata   metadata          `json:"metadata"`
	Data       map[string]string `json:"data,omitempty"`
	Spec       *leaseSpec        `json:"spec,omitempty"`
	Involved   *reference        `json:"involvedObject,omitempty"`
	Message    string            `json:"message,omitempty"`
}

type metadata struct {
	Name      string `json:"name,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Version   string `json:"resourceVersion,omitempty"`
	Continue  string `json:"continue,omitempty"`
}

type leaseSpec struct {
	Holder   string `json:"holderIdentity"`
	Duration int    `json:"leaseDurationSeconds"`
	Renewed  string `json:"renewTime"`
}

type reference struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// object gives one of this resource with a content; version may be empty.
func (r resource) object(name, content, version string) object {
	made := object{APIVersion: r.version, Kind: r.kind, Metadata: metadata{Name: name, Namespace: namespace, Version: version}}
	if r.group != "" {
		made.APIVersion = r.group + "/" + r.version
	}
	switch r {
	case configMaps:
		made.Data = map[string]string{"content": content}
	case leases:
		made.Spec = &leaseSpec{content, 15, time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")}
	case events:
		made.Message, made.Involved = content, &reference{"ConfigMap", namespace, "any"}
	}
	return made
}

func (o object) content() string {
	switch {
	case o.Spec != nil:
		return o.Spec.Holder
	case o.Message != "":
		return o.Message
	default:
		return o.Data["content"]
	}
}

func (o object) version() int64 { return number(o.Metadata.Version) }

func number(version string) int64 {
	n, err := strconv.ParseInt(version, 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// A status is how the API server tells an error.
type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (s *status) Error() string { return fmt.Sprintf("%d %s: %s", s.Code, s.Reason, s.Message) }

var errNotFound = errors.New("not found")

// An api is the way to the API server, which counts errors by kind.
type api struct {
	client *http.Client
	mutex  sync.Mutex
	errors map[string]int
}

func newAPI() *api {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	return &api{client: &http.Client{Transport: transport}, errors: map[string]int{}}
}

// What differs from one error to the next of a kind: addresses, names and numbers.
var particular = []struct {
	of *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`127\.[0-9.]+:\d+`), "ADDRESS"},
	{regexp.MustCompile(`(cm|lease|event|end)-[0-9-]+`), "NAME"},
	{regexp.MustCompile(`0x[0-9a-f]+`), "N"},
	{regexp.MustCompile(`\d+(\.\d+)?(m?s|µs)?\b`), "N"},
}

func kindOf(text string) string {
	for _, one := range particular {
		text = one.of.ReplaceAllString(text, one.by)
	}
	return text
}

// count counts an error of a call.
func (a *api) count(verb string, err error) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.errors[kindOf(verb+": "+err.Error())]++
}

// open sends a request and gives the body of its answer, which is no error.
func (a *api) open(ctx context.Context, method, path string, sent *object) (io.ReadCloser, error) {
	var body io.Reader
	if sent != nil {
		encoded, err := json.Marshal(sent)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, "https://"+apiAddress()+path, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Content-Type", "application/json")
	answer, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode < 300 {
		return answer.Body, nil
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(answer.Body)
	told := &status{}
	if json.Unmarshal(text, told) != nil || told.Code == 0 {
		told = &status{answer.StatusCode, "", string(text)}
	}
	return nil, told
}

// call sends a request and reads its answer into `got`.
func (a *api) call(method, path string, sent *object, got any) error {
	ctx, cancel := context.WithTimeout(context.Background(), callPatience)
	defer cancel()
	body, err := a.open(ctx, method, path, sent)
	if err != nil {
		return err
	}
	defer body.Close()
	// To its end: the API server would take anything else for a client that gave up.
	text, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, got)
}

// get reads an object until there is an answer.
func (a *api) get(of resource, name string) (got object, err error) {
	for {
		err := a.call(http.MethodGet, of.path()+"/"+name, nil, &got)
		var told *status
		switch {
		case err == nil:
			return got, nil
		case errors.As(err, &told) && told.Code == http.StatusNotFound:
			return got, errNotFound
		}
		a.count("get", err)
		time.Sleep(200 * time.Millisecond)
	}
}

// A listing is what a list showed, at its version.
type listing struct {
	of      resource
	began   time.Time
	version int64
	objects map[string]object
}

// list reads all objects of a resource, in pages if limit is not 0.
func (a *api) list(of resource, limit int) (listing, error) {
	shown := listing{of: of, began: time.Now(), objects: map[string]object{}}
	for more := ""; ; {
		var page struct {
			Metadata metadata `json:"metadata"`
			Items    []object `json:"items"`
		}
		if err := a.call(http.MethodGet, fmt.Sprintf("%s?limit=%d&continue=%s", of.path(), limit, more), nil, &page); err != nil {
			return shown, err
		}
		version := number(page.Metadata.Version)
		if more != "" && version != shown.version {
			return shown, fmt.Errorf("a page at version %d follows one at %d", version, shown.version)
		}
		shown.version = version
		for _, item := range page.Items {
			shown.objects[item.Metadata.Name] = item
		}
		if more = page.Metadata.Continue; more == "" {
			return shown, nil
		}
	}
}
