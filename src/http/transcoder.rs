//! Where JSON becomes messages and messages JSON: at once if it is little, else on threads for what takes long.
//!
//! Invariant: the event loop does no more of it in one go than [`SHORT_BYTES`] take. Absent: the transcoding itself (`gateway`, `requests`).

use std::time::Duration;

use crate::env::{Asker, Env, Instant, Pool, Refused};
use crate::error::Error;

/// A body of so many bytes is transcoded at once; that takes a millisecond or two. For more, threads are asked (`env::threads`).
const SHORT_BYTES: usize = 32 << 10;
/// How long a large body waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// Does what takes long with large bodies where it holds up nobody else.
#[derive(Clone)]
pub(super) struct Transcoder {
    pub(super) env: Env,
    /// The client.
    pub(super) asker: Asker,
}

impl Transcoder {
    pub(super) async fn run<T: Send + 'static, E: From<Error> + Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        if bytes <= SHORT_BYTES {
            return work();
        }
        let refused = |refused| match refused {
            Refused::Full => Error::TooManyRequests,
            Refused::Late => Error::Timeout,
        };
        let deadline = Instant::now() + PATIENCE;
        self.env.long_for(Pool::Reads, self.asker, deadline, work).await.map_err(refused)?
    }
}
