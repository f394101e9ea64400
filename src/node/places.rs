//! The places of requests that wait for Raft: how many there are, and who may take one.
//!
//! The last quarter is for clients, which are connections, that have no other request under way. Of the rest a client may have as many
//! as it leaves free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998), so that those who ask
//! too much soon have equal shares. Invariant: a place is held as long as something of the write waits, also if its client has given
//! up: who asks and leaves, again and again while there is no quorum, fills its share and not the memory.
//! Absent: waiting for a place; who finds none is told so at once and has cost next to nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;

/// What waits.
#[derive(Debug, Default)]
struct Taken {
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// Who asks; cloning shares its places. The default is nobody in particular: a member's own requests, which may take any free place.
#[derive(Clone, Debug, Default)]
pub struct Client(Option<Arc<Taken>>);

impl Client {
    /// A client that has asked nothing yet.
    pub fn new() -> Self {
        Self(Some(Arc::default()))
    }

    /// Tells those apart who live at the same time; 0: nobody in particular.
    pub fn number(&self) -> u64 {
        self.0.as_ref().map_or(0, |taken| Arc::as_ptr(taken).addr() as u64)
    }
}

/// A member's places.
pub(super) struct Places {
    requests_max: u64,
    bytes_max: u64,
    taken: Arc<Taken>,
}

/// A request's place.
pub(super) struct Place {
    all: Arc<Taken>,
    client: Client,
    bytes: u64,
}

impl Places {
    pub(super) fn new(requests_max: usize, bytes_max: u64) -> Self {
        Self { requests_max: requests_max as u64, bytes_max, taken: Arc::default() }
    }

    /// A place for a request of `bytes`, or `too many requests`.
    pub(super) fn take(&self, client: &Client, bytes: u64) -> Result<Place, Error> {
        let count = |taken: &Taken| {
            (
                taken.requests.fetch_add(1, Ordering::Relaxed) + 1,
                taken.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes,
            )
        };
        let (all_requests, all_bytes) = count(&self.taken);
        let (requests, of_bytes) = client.0.as_deref().map_or((1, bytes), count);
        // Gives back what was counted.
        let place = Place { all: self.taken.clone(), client: client.clone(), bytes };
        // All of these count this request.
        let fits = |own: u64, one: u64, all: u64, max: u64| match requests {
            1 => all <= max,
            _ => own.saturating_add(all) <= (max - max / 4).saturating_add(one),
        };
        if fits(requests, 1, all_requests, self.requests_max) && fits(of_bytes, bytes, all_bytes, self.bytes_max) {
            Ok(place)
        } else {
            Err(Error::TooManyRequests)
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for taken in [Some(&self.all), self.client.0.as_ref()].into_iter().flatten() {
            taken.requests.fetch_sub(1, Ordering::Relaxed);
            taken.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(places: &Places, client: &Client, bytes: u64) -> Vec<Place> {
        std::iter::from_fn(|| places.take(client, bytes).ok()).collect()
    }

    #[test]
    fn clients_that_ask_too_much_leave_places_to_others() {
        let places = Places::new(100, 1 << 20);
        let greedy: Vec<_> = (0..9).map(|_| Client::new()).collect();
        let mut held = take_all(&places, &greedy[0], 10);
        assert_eq!(held.len(), 38, "alone, half of three quarters");
        for client in &greedy[1..] {
            held.extend(take_all(&places, client, 10));
        }
        assert!(held.len() <= 75 + greedy.len(), "{}", held.len());
        let modest: Vec<_> = (0..10).map(|_| places.take(&Client::new(), 10)).collect();
        assert!(modest.iter().all(Result::is_ok), "{} places are held by the others", held.len());
        assert!(places.take(&Client::default(), 10).is_ok(), "nor are the member's own requests refused");
        assert!(places.take(&greedy[0], 10).is_err());
    }

    #[test]
    fn bytes_are_shared_as_requests_are() {
        let places = Places::new(1000, 1000);
        let greedy = Client::new();
        let held = take_all(&places, &greedy, 100);
        assert_eq!(held.len(), 4);
        assert!(places.take(&greedy, 1).is_err());
        assert!(places.take(&Client::new(), 601).is_err(), "more than there is");
        assert!(places.take(&Client::new(), 600).is_ok());
    }

    #[test]
    fn places_come_back() {
        let places = Places::new(8, 100);
        let client = Client::new();
        for _ in 0..3 {
            let held = take_all(&places, &client, 10);
            assert_eq!(held.len(), 3);
            // What was refused takes nothing.
            assert_eq!(places.taken.requests.load(Ordering::Relaxed), 3);
            assert_eq!(places.taken.bytes.load(Ordering::Relaxed), 30);
        }
        assert_eq!(take_all(&places, &Client::default(), 10).len(), 8, "nobody in particular may take all");
        assert_eq!(places.taken.requests.load(Ordering::Relaxed), 0);
    }
}
