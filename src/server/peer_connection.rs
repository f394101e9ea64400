//! The connections to the peer port: how many there are, and whose place another may take.
//!
//! A connection counts as a member's once a call on it was checked (`raft/guard`). When all places are taken, the oldest connection
//! that is nobody's yet is closed for the new one: so those who connect and say nothing, or nothing that is a member's, keep no
//! member out, however many they are. Invariant: at most `max` connections, and a member's is never closed for another.
//! Absent: what is asked on them (`api/peer`).

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::connection::{Connection, Kind};
use crate::api::Proof;
use crate::env::net::{Accepted, Incoming};
use crate::node::Client;
use crate::secure::{self, Io};

/// Connections by age.
#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, (Proof, CancellationToken)>,
}

impl Places {
    /// A place for one more, of at most `max`.
    fn take(&mut self, max: usize) -> Option<(u64, Proof, CancellationToken)> {
        if self.taken.len() >= max {
            let oldest = self.taken.iter().find(|(_, (proof, _))| !proof.is_given()).map(|(id, _)| *id)?;
            let (_, close) = self.taken.remove(&oldest)?;
            close.cancel();
        }
        let (id, place) = (self.next, (Proof::default(), CancellationToken::new()));
        self.next += 1;
        self.taken.insert(id, place.clone());
        Some((id, place.0, place.1))
    }
}

/// See the module's head.
pub(super) struct PeerConnection {
    inner: Connection,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    proof: Proof,
    id: u64,
    places: Arc<Mutex<Places>>,
}

impl Drop for PeerConnection {
    fn drop(&mut self) {
        self.places.lock().taken.remove(&self.id);
    }
}

impl Connected for PeerConnection {
    /// Every request on it has this in its extensions.
    type ConnectInfo = Proof;
    fn connect_info(&self) -> Proof {
        self.proof.clone()
    }
}

impl AsyncRead for PeerConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.closed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "another connection took the place",
            )));
        }
        Pin::new(&mut self.inner).poll_read(cx, into)
    }
}

impl AsyncWrite for PeerConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// At most `max` connections at a time, each of which says within `patience` what it speaks.
pub(super) fn bounded_peers(
    incoming: Incoming,
    max: usize,
    patience: Duration,
    tls: Option<Arc<secure::Port>>,
) -> impl futures_util::Stream<Item = io::Result<PeerConnection>> {
    let places = Arc::new(Mutex::new(Places::default()));
    incoming.filter_map(move |accepted| {
        let places = places.clone();
        let taken = accepted.map(|Accepted { stream, from }| {
            let place = places.lock().take(max);
            place.map(|(id, proof, close)| {
                let io = Io::accepted(stream, tls.as_ref(), proof.presented(), from);
                let inner = Connection::new(io, &Kind::Peer { patience }, Client::default(), Vec::new());
                PeerConnection { inner, closed: Box::pin(close.cancelled_owned()), proof, id, places }
            })
        });
        async move {
            if matches!(taken, Ok(None)) {
                tracing::warn!(max, "a peer's connection is refused: all places are members'");
            }
            taken.transpose()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_proved_nothing_makes_room_oldest_first_and_a_member_never_does() {
        let mut places = Places::default();
        let taken: Vec<_> = (0..4).map(|_| places.take(4).unwrap()).collect();
        taken[0].1.give();
        taken[2].1.give();
        places.take(4).unwrap().1.give();
        let closed: Vec<bool> = taken.iter().map(|(_, _, close)| close.is_cancelled()).collect();
        assert_eq!(closed, [false, true, false, false]);
        places.take(4).unwrap().1.give();
        assert!(taken[3].2.is_cancelled());
        assert!(places.take(4).is_none(), "all are members'");
        places.taken.remove(&taken[0].0);
        assert!(places.take(4).is_some());
        assert_eq!(places.taken.len(), 4);
    }
}
