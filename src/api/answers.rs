//! Places for large answers: what is being sent to clients takes a bounded share of memory.
//!
//! Invariant: the answers that hold a place take at most the budget together, or there is one alone that is larger. An answer
//! that finds no place waits; after the request's time it fails with `too many requests`. Small ones need no place.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::env::timeout;
use crate::error::Error;

/// Smaller answers are not counted: what a connection's streams hold of them is bounded by their number.
const SMALL_BYTES: usize = 16 << 10;
/// A permit stands for so many bytes.
const UNIT_BYTES: usize = 1 << 10;

/// A place, held until the answer was sent; it travels in the response's extensions (`server::budget`).
#[derive(Clone)]
pub struct Held {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// The places of all clients.
pub(super) struct Answers {
    places: Arc<Semaphore>,
    units: u32,
}

impl Answers {
    pub(super) fn new(bytes_max: usize) -> Self {
        let units = u32::try_from(bytes_max / UNIT_BYTES).unwrap_or(u32::MAX).clamp(1, 1 << 28);
        Self { places: Arc::new(Semaphore::new(units as usize)), units }
    }

    /// A place for an answer of so many bytes; `None` if it needs none.
    pub(super) async fn hold(&self, bytes: usize, patience: Duration) -> Result<Option<Held>, Error> {
        if bytes < SMALL_BYTES {
            return Ok(None);
        }
        let units = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX).min(self.units);
        match timeout(patience, self.places.clone().acquire_many_owned(units)).await {
            Ok(Ok(permit)) => Ok(Some(Held { _permit: Arc::new(permit) })),
            Ok(Err(_)) | Err(_) => Err(Error::TooManyRequests),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn large_answers_wait_for_a_place_and_small_ones_do_not() {
        let answers = Answers::new(1 << 20);
        let second = Duration::from_secs(1);
        let held = answers.hold(800 << 10, second).await.unwrap();
        assert!(held.is_some());
        assert_eq!(answers.hold(300 << 10, second).await.err(), Some(Error::TooManyRequests));
        assert!(answers.hold(100, second).await.unwrap().is_none());
        assert!(answers.hold(100 << 10, second).await.is_ok());
        drop(held);
        assert!(answers.hold(700 << 10, second).await.is_ok());
        // One that is larger than all places together gets them all.
        assert!(answers.hold(100 << 20, second).await.unwrap().is_some());
    }
}
