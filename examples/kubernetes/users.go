// Who uses the API server, and what they write down.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

const (
	writers      = 8
	writerPause  = 40 * time.Millisecond
	holders      = 20
	renewal      = time.Second
	eventPause   = 200 * time.Millisecond
	listPause    = 500 * time.Millisecond
	pageObjects  = 200
	watchersEach = 4
)

// A write is one that was tried.
type write struct {
	of            resource
	verb          string
	name, content string
	acknowledged  bool
	// Of what was written; a deletion is not told its own.
	version    int64
	began, end time.Time
}

// An event is what a watcher was told.
type event struct {
	kind          string
	name, content string
	version       int64
	at            time.Time
}

func (e event) String() string {
	return fmt.Sprintf("%s %s %q at %d", e.kind, e.name, e.content, e.version)
}

// A watcher follows a resource from a version on. One that is restless closes its watch every few seconds, and goes on where it was.
type watcher struct {
	of       resource
	restless bool
	told     []event
	last     int64
	watches  int
	broken   error
}

type crowd struct {
	*api
	mutex    sync.Mutex
	writes   []write
	acked    int
	newest   time.Time
	longest  time.Duration
	listings []listing
	watchers []*watcher
	// Ends those who write and list.
	using   context.Context
	stop    context.CancelFunc
	users   sync.WaitGroup
	watched context.Context
	unwatch context.CancelFunc
	follows sync.WaitGroup
}

func newCrowd() *crowd {
	c := &crowd{api: newAPI()}
	c.using, c.stop = context.WithCancel(context.Background())
	c.watched, c.unwatch = context.WithCancel(context.Background())
	return c
}

func (c *crowd) pause(of time.Duration) bool {
	select {
	case <-c.using.Done():
		return false
	case <-time.After(of):
		return true
	}
}

// try writes once, and writes down what became of it.
func (c *crowd) try(of resource, verb, name, content, version string) (object, error) {
	tried := write{of: of, verb: verb, name: name, content: content, began: time.Now()}
	var got object
	var err error
	switch sent := of.object(name, content, version); verb {
	case "create":
		err = c.call(http.MethodPost, of.path(), &sent, &got)
	case "update":
		err = c.call(http.MethodPut, of.path()+"/"+name, &sent, &got)
	case "delete":
		err = c.call(http.MethodDelete, of.path()+"/"+name, nil, &got)
	}
	tried.end = time.Now()
	tried.acknowledged = err == nil
	if err != nil {
		c.count(verb, err)
	} else if verb != "delete" {
		tried.version = got.version()
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.writes = append(c.writes, tried)
	if err == nil {
		c.acked++
		c.longest = max(c.longest, tried.end.Sub(c.newest))
		c.newest = tried.end
	}
	return got, err
}

// settled writes, and reads if nothing is known of the fate. An object that is not as it was to be is given up: the write may still come.
func (c *crowd) settled(of resource, verb, name, content, version string) (object, error) {
	got, err := c.try(of, verb, name, content, version)
	if err == nil {
		return got, nil
	}
	got, missing := c.get(of, name)
	if verb == "delete" {
		if missing != nil {
			return got, nil
		}
		return got, err
	}
	if missing != nil || got.content() != content {
		return got, err
	}
	return got, nil
}

func (c *crowd) acknowledged() int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.acked
}

// writer makes ConfigMaps, changes some, and deletes some.
func (c *crowd) writer(number int) {
	for n := 0; c.pause(writerPause); n++ {
		name := fmt.Sprintf("cm-%d-%d", number, n)
		got, err := c.settled(configMaps, "create", name, name+"/0", "")
		for change := 1; err == nil && change <= n%3 && c.pause(writerPause); change++ {
			got, err = c.settled(configMaps, "update", name, fmt.Sprintf("%s/%d", name, change), got.Metadata.Version)
		}
		if err == nil && n%4 == 0 && c.pause(writerPause) {
			_, _ = c.settled(configMaps, "delete", name, "", "")
		}
	}
}

// holder renews a Lease of its own; one that was lost to an unknown fate is followed by another.
func (c *crowd) holder(number int) {
	for life := 0; ; life++ {
		name := fmt.Sprintf("lease-%d-%d", number, life)
		got, err := c.settled(leases, "create", name, name+"/0", "")
		for n := 1; err == nil; n++ {
			if !c.pause(renewal) {
				return
			}
			got, err = c.settled(leases, "update", name, fmt.Sprintf("%s/%d", name, n), got.Metadata.Version)
		}
		if !c.pause(renewal) {
			return
		}
	}
}

// teller makes Events, which go by themselves.
func (c *crowd) teller() {
	for n := 0; c.pause(eventPause); n++ {
		name := fmt.Sprintf("event-%d", n)
		_, _ = c.try(events, "create", name, name, "")
	}
}

// lister lists at once, which the API server does from its cache, and in pages, which it does from the members.
func (c *crowd) lister() {
	for n := 0; c.pause(listPause); n++ {
		of := []resource{configMaps, leases}[n%2]
		shown, err := c.list(of, []int{0, pageObjects}[n/2%2])
		if err != nil {
			c.count("list", err)
			continue
		}
		c.mutex.Lock()
		c.listings = append(c.listings, shown)
		c.mutex.Unlock()
	}
}

// follow watches until it is stopped.
func (c *crowd) follow(w *watcher) {
	for c.watched.Err() == nil && w.broken == nil {
		if err := c.watchOnce(w); err != nil && c.watched.Err() == nil {
			c.count("watch", err)
			var told *status
			if errors.As(err, &told) && told.Code == http.StatusGone {
				c.mutex.Lock()
				w.broken = err
				c.mutex.Unlock()
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
}

// watchOnce follows one watch to its end.
func (c *crowd) watchOnce(w *watcher) error {
	ctx, cancel := context.WithCancel(c.watched)
	defer cancel()
	if w.restless {
		defer time.AfterFunc(time.Second+rand.N(3*time.Second), cancel).Stop()
	}
	path := fmt.Sprintf("%s?watch=true&allowWatchBookmarks=true&resourceVersion=%d", w.of.path(), w.last)
	body, err := c.open(ctx, http.MethodGet, path, nil)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer body.Close()
	w.watches++
	for decoder := json.NewDecoder(body); ; {
		var message struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		if err := decoder.Decode(&message); err != nil {
			// The API server ends watches, too: clients then go on where they were.
			if ctx.Err() != nil || errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if message.Type == "ERROR" {
			told := &status{}
			if err := json.Unmarshal(message.Object, told); err != nil {
				return err
			}
			return told
		}
		var about object
		if err := json.Unmarshal(message.Object, &about); err != nil {
			return err
		}
		c.mutex.Lock()
		if message.Type != "BOOKMARK" {
			w.told = append(w.told, event{message.Type, about.Metadata.Name, about.content(), about.version(), time.Now()})
		}
		w.last = about.version()
		c.mutex.Unlock()
	}
}

// begin starts everybody.
func (c *crowd) begin() error {
	for _, of := range []resource{configMaps, leases, events} {
		shown, err := c.list(of, 0)
		if err != nil {
			return err
		}
		for n := range watchersEach {
			// Who leaves amid the keys of a lease that ended would miss the others.
			w := &watcher{of: of, restless: n%2 == 1 && of != events, last: shown.version}
			c.watchers = append(c.watchers, w)
			c.follows.Go(func() { c.follow(w) })
		}
	}
	c.newest = time.Now()
	for number := range writers {
		c.users.Go(func() { c.writer(number) })
	}
	for number := range holders {
		c.users.Go(func() { c.holder(number) })
	}
	c.users.Go(c.teller)
	c.users.Go(c.lister)
	return nil
}

// end stops who writes, and waits until every watcher has been told of all.
func (c *crowd) end() error {
	c.stop()
	c.users.Wait()
	for _, of := range []resource{configMaps, leases, events} {
		var last object
		err := until("a last write", func() (err error) {
			name := fmt.Sprintf("end-%d", time.Now().UnixNano())
			last, err = c.try(of, "create", name, name, "")
			return err
		})
		if err != nil {
			return err
		}
		for number, w := range c.watchers {
			if w.of != of {
				continue
			}
			err := until(fmt.Sprintf("the end of watcher %d of %s", number, of.plural), func() error {
				c.mutex.Lock()
				defer c.mutex.Unlock()
				if w.broken == nil && !w.isComplete(last.version()) {
					return fmt.Errorf("it has come to %d of %d, %d live", w.last, last.version(), len(w.alive()))
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// alive gives what is there by what the watcher was told.
func (w *watcher) alive() map[string]event {
	live := map[string]event{}
	for _, one := range w.told {
		if one.kind == "DELETED" {
			delete(live, one.name)
		} else {
			live[one.name] = one
		}
	}
	return live
}

// isComplete: it has been told of everything up to a version, and that Events have gone.
func (w *watcher) isComplete(version int64) bool {
	return w.last >= version && (w.of != events || len(w.alive()) == 0)
}
