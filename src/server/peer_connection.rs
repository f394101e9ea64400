//! The connections to the peer port: how many there are, and whose place another may take.
//!
//! A connection counts as a member's once a call on it was checked (`raft/guard`). When all places are taken, the oldest connection
//! that is nobody's yet is closed for the new one: so those who connect and say nothing, or nothing that is a member's, keep no
//! member out, however many they are. What such connections have sent, and the streams that they have opened, is counted, since all of it
//! may be held for them: when it is too much together, the oldest of them go here, too. (A member that has just connected may have sent
//! most: a large append, which is checked as soon as it is whole.)
//! Invariants: at most `max` connections; what all that are nobody's yet have sent is bounded; a member's is never closed for another.
//! Absent: what is asked on them (`api/peer`), and what members hold, who are trusted.

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
use tonic::{Request, Status};

use super::connection::{Connection, Kind};
use crate::api::Proof;
use crate::env::net::{Accepted, Incoming};
use crate::node::Client;
use crate::secure::{self, Io};

/// What a stream takes beside the bytes by which it was opened: its headers, which refer to what was said before, and the call.
const STREAM_BYTES: u64 = 12 << 10;

/// How many connections there may be, and what they may do.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub(super) connections: usize,
    /// What all connections that are nobody's may have sent.
    pub(super) unproved_bytes: u64,
    /// Time to say what they speak.
    pub(super) patience: Duration,
}

/// Connections by age.
#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, (Proof, CancellationToken)>,
    /// What those that are nobody's have sent, or more: it is counted anew when it is too much.
    unproved_bytes: u64,
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

    /// Counts what a connection has sent that is nobody's yet.
    fn count(&mut self, proof: &Proof, bytes: u64, max: u64) {
        proof.add_unproved(bytes);
        self.unproved_bytes += bytes;
        if self.unproved_bytes <= max {
            return;
        }
        self.unproved_bytes = self.taken.values().map(|(proof, _)| proof.unproved_bytes()).sum();
        while self.unproved_bytes > max {
            let mut by_age = self.taken.iter().map(|(id, (proof, _))| (*id, proof.unproved_bytes()));
            let Some((oldest, bytes)) = by_age.find(|(_, bytes)| *bytes > 0) else { return };
            self.unproved_bytes = self.unproved_bytes.saturating_sub(bytes);
            if let Some((_, close)) = self.taken.remove(&oldest) {
                close.cancel();
            }
        }
    }
}

/// Counts a call as it begins.
pub(super) fn count_stream(request: Request<()>) -> Result<Request<()>, Status> {
    if let Some(proof) = request.extensions().get::<Proof>()
        && !proof.is_given()
    {
        proof.add_unproved(STREAM_BYTES);
    }
    Ok(request)
}

/// See the module's head.
pub(super) struct PeerConnection {
    inner: Connection,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    proof: Proof,
    id: u64,
    bounds: Bounds,
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
        let before = into.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, into);
        let bytes = (into.filled().len() - before) as u64;
        if bytes > 0 && !self.proof.is_given() {
            self.places.lock().count(&self.proof, bytes, self.bounds.unproved_bytes);
        }
        read
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

/// The connections that keep within `bounds`.
pub(super) fn bounded_peers(
    incoming: Incoming,
    bounds: Bounds,
    tls: Option<Arc<secure::Port>>,
) -> impl futures_util::Stream<Item = io::Result<PeerConnection>> {
    let places = Arc::new(Mutex::new(Places::default()));
    incoming.filter_map(move |accepted| {
        let places = places.clone();
        let taken = accepted.map(|Accepted { stream, from }| {
            let place = places.lock().take(bounds.connections);
            place.map(|(id, proof, close)| {
                let io = Io::accepted(stream, tls.as_ref(), proof.presented(), from);
                let inner =
                    Connection::new(io, &Kind::Peer { patience: bounds.patience }, Client::default(), Vec::new());
                PeerConnection { inner, closed: Box::pin(close.cancelled_owned()), proof, id, bounds, places }
            })
        });
        async move {
            if matches!(taken, Ok(None)) {
                tracing::warn!(max = bounds.connections, "a peer's connection is refused: all places are members'");
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

    #[test]
    fn what_strangers_send_is_bounded_and_members_go_on_whatever_they_send() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let max = random.u64(1000..100_000);
            let (mut places, mut members) = (Places::default(), Vec::new());
            let mut all = Vec::new();
            for _ in 0..random.usize(1..400) {
                match random.u8(..8) {
                    0 => all.extend(places.take(100)),
                    1 if !all.is_empty() => {
                        let (_, proof, close): &(u64, Proof, CancellationToken) = random.choice(&all).unwrap();
                        if !close.is_cancelled() {
                            proof.give();
                            members.push(close.clone());
                        }
                    }
                    2 if !all.is_empty() => {
                        let (id, ..) = all.swap_remove(random.usize(..all.len()));
                        places.taken.remove(&id);
                    }
                    _ if !all.is_empty() => {
                        let (_, proof, close) = random.choice(&all).unwrap();
                        if !close.is_cancelled() && !proof.is_given() {
                            let bytes = random.u64(..max / 2);
                            places.count(proof, bytes, max);
                        }
                    }
                    _ => {}
                }
                let held: u64 = places.taken.values().map(|(proof, _)| proof.unproved_bytes()).sum();
                assert!(held <= max, "{held} of {max}");
                assert!(members.iter().all(|close| !close.is_cancelled()), "a member's was closed");
            }
        }
    }

    #[test]
    fn of_strangers_that_send_too_much_the_oldest_are_closed() {
        let mut places = Places::default();
        let taken: Vec<_> = (0..4).map(|_| places.take(10).unwrap()).collect();
        for ((_, proof, _), bytes) in taken.iter().zip([10, 500, 300, 100]) {
            places.count(proof, bytes, 1000);
        }
        places.count(&taken[0].1, 100, 1000);
        let closed = || taken.iter().map(|(_, _, close)| close.is_cancelled()).collect::<Vec<_>>();
        assert_eq!(closed(), [true, false, false, false]);
        taken[1].1.give();
        // A member's large message, before it is known whose it is.
        places.count(&taken[3].1, 800, 1000);
        assert_eq!(closed(), [true, false, true, false], "what a member sent does not count");
    }
}
