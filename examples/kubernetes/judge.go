// What must be true of what was written down.
package main

import (
	"fmt"
	"slices"
)

// A history is what happened to a resource, by its watchers.
type history struct {
	events []event
	at     map[int64]event
}

// state gives what was there at a version.
func (h history) state(version int64) map[string]event {
	live := map[string]event{}
	for _, one := range h.events {
		if one.version > version {
			break
		}
		if one.kind == "DELETED" {
			delete(live, one.name)
		} else {
			live[one.name] = one
		}
	}
	return live
}

func same(one, other event) bool {
	one.at = other.at
	return one == other
}

// judge gives everything that is not as it must be. Nobody writes any more.
func (c *crowd) judge() (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	histories := map[resource]history{}
	for number, w := range c.watchers {
		if w.broken != nil {
			fault("watcher %d of %s could not go on: %v", number, w.of.plural, w.broken)
			continue
		}
		for n := 1; n < len(w.told); n++ {
			// A lease that ends takes its keys at one revision.
			if before := w.told[n-1]; w.told[n].version < before.version || w.told[n].version == before.version && w.of != events {
				fault("watcher %d of %s was told %v after %v", number, w.of.plural, w.told[n], before)
			}
		}
		first, known := histories[w.of]
		if !known {
			first = history{w.told, map[int64]event{}}
			for _, one := range w.told {
				first.at[one.version] = one
			}
			histories[w.of] = first
		}
		if !slices.EqualFunc(first.events, w.told, same) {
			n := 0
			for n < len(first.events) && n < len(w.told) && same(first.events[n], w.told[n]) {
				n++
			}
			fault("watcher %d of %s was told %d events, another one %d; the first that differs is number %d", number, w.of.plural, len(w.told),
				len(first.events), n)
		}
	}
	faults = append(faults, c.judgeWrites(histories)...)
	faults = append(faults, c.judgeListings(histories)...)
	return faults
}

// judgeWrites: what was acknowledged has happened as it was, and nothing happened that nobody tried.
func (c *crowd) judgeWrites(histories map[resource]history) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	type deed struct {
		of            resource
		kind          string
		name, content string
	}
	kinds := map[string]string{"create": "ADDED", "update": "MODIFIED", "delete": "DELETED"}
	tried := map[deed]int{}
	told := map[resource]map[string]bool{}
	for of, history := range histories {
		told[of] = map[string]bool{}
		for _, one := range history.events {
			if one.kind == "DELETED" {
				told[of][one.name] = true
			}
		}
	}
	born := map[string]write{}
	for _, one := range c.writes {
		content := one.content
		tried[deed{one.of, kinds[one.verb], one.name, content}]++
		if one.of == events {
			born[one.name] = one
		}
		history, known := histories[one.of]
		if !one.acknowledged || !known {
			continue
		}
		if one.verb == "delete" {
			if !told[one.of][one.name] {
				fault("the deletion of %s was acknowledged, and nobody was told", one.name)
			}
			continue
		}
		want := event{kinds[one.verb], one.name, content, one.version, one.end}
		if got := history.at[one.version]; !same(got, want) {
			fault("acknowledged: %v; told: %v", want, got)
		}
	}
	for of, history := range histories {
		for _, one := range history.events {
			key := deed{of, one.kind, one.name, one.content}
			if one.kind == "DELETED" {
				key.content = ""
			}
			if of == events && one.kind == "DELETED" {
				if lived := one.at.Sub(born[one.name].began); lived < eventTTL {
					fault("%s is gone after %v", one.name, lived)
				}
				continue
			}
			if tried[key] == 0 {
				fault("nobody asked for %v, or not twice", one)
			}
			tried[key]--
		}
	}
	return faults
}

// judgeListings: each list shows what was there at its version, which is not before anything that was acknowledged when it began.
func (c *crowd) judgeListings(histories map[resource]history) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for _, shown := range c.listings {
		history, known := histories[shown.of]
		if !known {
			continue
		}
		for _, one := range c.writes {
			if one.of == shown.of && one.end.Before(shown.began) && one.version > shown.version {
				fault("a list of %s is at version %d, but %d had been acknowledged", shown.of.plural, shown.version, one.version)
				break
			}
		}
		want := history.state(shown.version)
		if len(want) != len(shown.objects) {
			fault("a list of %s at version %d has %d objects, not %d", shown.of.plural, shown.version, len(shown.objects), len(want))
		}
		for name, item := range shown.objects {
			if one, is := want[name]; !is || one.version != item.version() || one.content != item.content() {
				fault("a list of %s at version %d shows %s as %q of %d, not %v", shown.of.plural, shown.version, name, item.content(),
					item.version(), one)
				break
			}
		}
	}
	return faults
}
