//! The places of requests that wait for Raft: how many there are, and who may take one.
//!
//! Invariant: a place is held as long as something of the write waits, also if its client has given up: who asks and leaves, again and
//! again while there is no quorum, fills its share and not the memory.
//! Absent: what a share is (`account`); waiting for a place: who finds none is told so at once and has cost next to nothing.

use std::sync::Arc;

use super::account::{Client, Kind, Pool, Taken};
use crate::error::Error;
use crate::raft::Held;

/// A member's places.
pub(super) struct Places {
    requests: Arc<Pool>,
    bytes: Arc<Pool>,
}

/// A request's place.
pub(super) struct Place {
    request: Taken,
    bytes: Taken,
}

impl Held for Place {
    fn give_back(&self) {
        self.request.give_all();
        self.bytes.give_all();
    }
}

impl Places {
    pub(super) fn new(requests_max: usize, bytes_max: u64) -> Self {
        Self {
            requests: Pool::new(Kind::Requests, requests_max as u64),
            bytes: Pool::new(Kind::RequestBytes, bytes_max),
        }
    }

    /// A place for a read, which has nothing to keep, or `too many requests`.
    pub(super) fn take_one(&self, client: &Client) -> Result<Taken, Error> {
        self.requests.take(client, 1)
    }

    /// A place for a request of `bytes`, or `too many requests`.
    pub(super) fn take(&self, client: &Client, bytes: u64) -> Result<Place, Error> {
        Ok(Place { request: self.requests.take(client, 1)?, bytes: self.bytes.take(client, bytes)? })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::env::Instant;
    use crate::raft::Waiters;

    fn take_all(places: &Places, client: &Client, bytes: u64) -> Vec<Place> {
        std::iter::from_fn(|| places.take(client, bytes).ok()).collect()
    }

    #[test]
    fn bytes_are_shared_as_requests_are() {
        let places = Places::new(1000, 1000);
        let greedy = Client::new(None);
        let held = take_all(&places, &greedy, 100);
        assert_eq!(held.len(), 4);
        assert!(places.take(&greedy, 1).is_err());
        assert!(places.take(&Client::new(None), 601).is_err(), "more than there is");
        assert!(places.take(&Client::new(None), 600).is_ok());
    }

    #[test]
    fn who_was_answered_holds_no_place_though_its_proposal_is_not_forgotten_yet() {
        let places = Places::new(8, 100);
        let (client, waiters) = (Client::new(None), Waiters::default());
        let place = Arc::new(places.take(&client, 10).unwrap());
        let number = waiters.origin(0).number;
        let _told = waiters.wait(number, 1, Instant::now() + Duration::from_secs(1), place.clone()).unwrap();
        waiters.end_applied(number);
        assert_eq!((places.requests.taken(), places.bytes.taken()), (0, 0));
        drop(place);
        assert_eq!((places.requests.taken(), places.bytes.taken()), (0, 0), "it is given back once");
    }

    #[test]
    fn places_come_back() {
        let places = Places::new(8, 100);
        let client = Client::new(None);
        for _ in 0..3 {
            let held = take_all(&places, &client, 10);
            assert_eq!(held.len(), 3);
            // What was refused takes nothing.
            assert_eq!(places.requests.taken(), 3);
            assert_eq!(places.bytes.taken(), 30);
        }
        assert_eq!(take_all(&places, &Client::default(), 10).len(), 8, "nobody in particular may take all");
        assert_eq!(places.requests.taken(), 0);
    }
}
