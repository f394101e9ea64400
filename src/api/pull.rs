//! Streams whose pieces are made when their client takes them.
//!
//! A piece is made in a pool when the transport asks for it, which it does when the client has taken the ones before; so a client that
//! takes nothing holds no thread. It does hold what the pieces are made of, a view that keeps what is overwritten in memory, so it is
//! given up when it takes less than [`PACE_MIN`]; what the server needs for a piece is not counted against it.
//! Invariants: few streams are open at a time, and of these a host leaves others a quarter, however many connections it has, and a
//! connection has as many as it leaves free ([`Share`]); a stream that ends, however, lets go of what it holds on a thread of its own.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::answers::outdated;
use crate::env::rota::Share;
use crate::env::{Asker, Env, Instant, Pool, sleep_until};
use crate::error::Error;
use crate::node::Node;

/// Longest that a client takes nothing.
const STALL_MAX: Duration = Duration::from_secs(60);
/// Bytes a second that a client takes at least, on average and beyond [`STALL_MAX`].
const PACE_MIN: f64 = (64 << 10) as f64;

/// What pieces are made of.
pub(super) trait Source: Send + 'static {
    type Piece: Send + 'static;

    /// The next piece and its bytes; `None` after the last.
    fn piece(&mut self) -> Result<Option<(Self::Piece, usize)>, Status>;
}

pub(super) type Pieces<P> = Pin<Box<dyn Stream<Item = Result<P, Status>> + Send>>;

/// How a stream's pieces are made.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// For messages: `backup`.
    pub what: &'static str,
    pub pool: Pool,
    /// Bytes a second at most, `u64::MAX` for no bound.
    pub rate: u64,
    /// The stream is given up when more than this was freed of the state since it began: its view may keep that.
    pub kept_max: u64,
}

/// The pieces of `source`, for `node`'s client.
pub(super) fn pieces<S: Source>(node: &Node, plan: Plan, source: S, slot: Slot) -> Pieces<S::Piece> {
    let held = Arc::new(Held {
        env: node.env().clone(),
        plan,
        state: Mutex::new(Idle { source: Some((source, slot)), since: Instant::now(), patience: STALL_MAX }),
        ended: CancellationToken::new(),
    });
    let freed = node.freed_bytes();
    node.env().spawn(give_up(held.clone(), node.clone(), freed));
    let puller = Puller { node: node.clone(), held };
    Box::pin(stream::unfold(Some(puller), |puller| async {
        let puller = puller?;
        match puller.next().await {
            Ok(piece) => Some((Ok(piece?), Some(puller))),
            // Nothing comes after an error.
            Err(status) => Some((Err(status), None)),
        }
    }))
}

/// What a stream holds between its pieces.
struct Held<S: Source> {
    env: Env,
    plan: Plan,
    state: Mutex<Idle<(S, Slot)>>,
    ended: CancellationToken,
}

struct Idle<S> {
    /// Not there while a piece is made, nor after the end.
    source: Option<S>,
    /// When the client was given the last piece.
    since: Instant,
    /// How long it may take for it.
    patience: Duration,
}

impl<S> Idle<S> {
    /// The client takes the next piece.
    fn take(&mut self, now: Instant) -> Option<S> {
        self.patience = self.patience.saturating_sub(now - self.since);
        self.source.take()
    }

    /// The client is given a piece of so many bytes, at `now`.
    fn give(&mut self, source: S, bytes: usize, now: Instant) {
        self.source = Some(source);
        self.since = now;
        self.patience = STALL_MAX.min(self.patience + Duration::from_secs_f64(bytes as f64 / PACE_MIN));
    }

    /// Until when the client has to take the next piece; `None` while one is made.
    fn deadline(&self) -> Option<Instant> {
        self.source.as_ref().map(|_| self.since + self.patience)
    }
}

impl<S: Source> Held<S> {
    fn let_go(&self) {
        let source = self.state.lock().source.take();
        if let Some((source, _slot)) = source {
            self.env.drop_large(source);
        }
    }
}

/// Waits until the client is too slow, or the view keeps too much, or the stream ends.
async fn give_up<S: Source>(held: Arc<Held<S>>, node: Node, freed: u64) {
    loop {
        let now = Instant::now();
        // A piece that is made now gives the client some time again.
        let deadline = held.state.lock().deadline().unwrap_or(now + STALL_MAX / 4);
        if deadline <= now {
            tracing::warn!("a client takes its {} too slowly; given up", held.plan.what);
            held.let_go();
            return;
        }
        tokio::select! {
            () = sleep_until(deadline) => {}
            () = outdated(&node, freed, held.plan.kept_max) => return held.let_go(),
            () = held.ended.cancelled() => return,
            () = held.env.shutdown.cancelled() => return held.let_go(),
        }
    }
}

/// The client's end.
struct Puller<S: Source> {
    node: Node,
    held: Arc<Held<S>>,
}

impl<S: Source> Puller<S> {
    async fn next(&self) -> Result<Option<S::Piece>, Status> {
        let env = &self.held.env;
        let begin = Instant::now();
        let source = self.held.state.lock().take(begin);
        let Some((mut source, slot)) = source else {
            if env.shutdown.is_cancelled() {
                return Err(Error::Stopped.into());
            }
            let text = format!("the {} was taken too slowly, and given up; take it anew", self.held.plan.what);
            return Err(Status::deadline_exceeded(text));
        };
        let work = move || (source.piece(), source, slot);
        let (made, source, slot) = tokio::select! {
            done = self.node.long_within(self.held.plan.pool, STALL_MAX, work) => done?,
            () = env.shutdown.cancelled() => return Err(Error::Stopped.into()),
        };
        let Some((piece, bytes)) = made? else {
            env.drop_large(source);
            return Ok(None);
        };
        let paced = begin + Duration::from_secs_f64(bytes as f64 / self.held.plan.rate as f64);
        self.held.state.lock().give((source, slot), bytes, paced.max(Instant::now()));
        sleep_until(paced).await;
        Ok(Some(piece))
    }
}

impl<S: Source> Drop for Puller<S> {
    fn drop(&mut self) {
        self.held.ended.cancel();
        self.held.let_go();
    }
}

/// Places of streams that may be open at a time. Cloning shares them.
#[derive(Clone)]
pub(super) struct Slots {
    max: usize,
    taken: Arc<Mutex<HashMap<Asker, usize>>>,
}

/// A stream's place.
pub(super) struct Slot {
    asker: Asker,
    taken: Arc<Mutex<HashMap<Asker, usize>>>,
}

impl Slots {
    pub(super) fn new(max: usize) -> Self {
        Self { max, taken: Arc::default() }
    }

    /// A place for a stream, or `too many requests`.
    pub(super) fn take(&self, asker: Asker) -> Result<Slot, Error> {
        let mut taken = self.taken.lock();
        let connection = taken.get(&asker).copied().unwrap_or(0);
        let host = taken.iter().filter(|(other, _)| other.host == asker.host).map(|(_, own)| own).sum();
        let share = Share { all: taken.values().sum(), host, connection };
        if !share.has_room(self.max) {
            return Err(Error::TooManyRequests);
        }
        taken.insert(asker, connection + 1);
        drop(taken);
        Ok(Slot { asker, taken: self.taken.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        match taken.get_mut(&self.asker) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.remove(&self.asker)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_leaves_a_quarter_of_the_places_to_others_whatever_it_takes_and_gives_back() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let max = random.usize(2..300);
            let (slots, connections) = (Slots::new(max), random.u64(1..600));
            let mut held = Vec::new();
            for _ in 0..1000 {
                if random.u8(..8) == 0 && !held.is_empty() {
                    held.swap_remove(random.usize(..held.len()));
                } else {
                    held.extend(slots.take(Asker { host: 1, connection: random.u64(0..connections) }));
                }
            }
            let (has, left) = (held.len(), max - held.len());
            assert!(left > 0 && left >= max / 4, "{has} of {max} for {connections} connections");
            let others: Vec<_> = (2..).map_while(|host| slots.take(Asker { host, connection: 1 }).ok()).collect();
            assert_eq!(others.len(), left, "who has none gets any");
            drop(others);
            let other: Vec<_> =
                (0..max as u64 * 2).map_while(|n| slots.take(Asker { host: 2, connection: n }).ok()).collect();
            assert!(!other.is_empty() && other.len() >= max / 16, "{} of {max}", other.len());
            drop((held, other));
            assert!(slots.taken.lock().is_empty());
        }
        assert_eq!(Slots::new(1).take(Asker { host: 1, connection: 1 }).err(), None);
    }

    #[test]
    fn patience_ends_for_who_stalls_and_for_who_only_trickles() {
        let mut now = Instant::now();
        let mut idle = Idle { source: Some(()), since: now, patience: STALL_MAX };
        assert_eq!(idle.deadline(), Some(now + STALL_MAX));
        // A slow line.
        for _ in 0..1000 {
            now += Duration::from_millis(1990);
            assert!(idle.deadline() > Some(now));
            assert!(idle.take(now).is_some() && idle.deadline().is_none());
            // The server takes its time too.
            now += Duration::from_secs(7);
            idle.give((), 128 << 10, now);
        }
        assert_eq!(idle.deadline(), Some(now + STALL_MAX), "it is not saved up");
        // One piece now and then.
        let mut pieces = 0;
        while idle.deadline() > Some(now + Duration::from_secs(50)) {
            now += Duration::from_secs(50);
            assert!(idle.take(now).is_some());
            idle.give((), 64 << 10, now);
            pieces += 1;
        }
        assert_eq!(pieces, 1);
    }
}
