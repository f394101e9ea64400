//! Large answers and views: what is kept for a client that has not taken its answer yet.
//!
//! A large answer travels beside an empty message, in the response's extensions; whoever writes the response to a client
//! (`server::budget`, the JSON gateway) writes it in the message's place, in pieces as they are taken. Until then the answer is a list of
//! references to versions. Most of these the store holds anyway; what is overwritten and compacted meanwhile only the answer holds. So
//! an answer of moderate size is charged with all of its bytes; a larger one with its references, and it is given up when more was
//! freed of the state since it was made than [`kept_max`] allows. So are streams that hold a view, whatever time they take.
//! Invariants: one large answer after the other has a piece of the event loop's time ([`Written`]); what answers and views keep of what is no longer in the state is bounded. An answer that finds no room waits without being
//! kept, and after the request's time fails with `too many requests`.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tonic::Response;

use super::Api;
use super::turns::Turns;
use crate::env::{self, Env, Instant, sleep};
use crate::error::Error;
use crate::node::Node;
use crate::node::account::{Pool, Taken};
use crate::pb::pieces::{LargeAnswer, PIECE_BYTES, Pieces};

/// What an answer copies is charged before it is made, if it may be more than this.
const COPIED_BYTES_MAX: u64 = 1 << 20;
/// Smaller answers are written at once.
pub(super) const LARGE_BYTES: usize = 16 << 10;
/// No client takes a larger message.
const ANSWER_BYTES_MAX: usize = i32::MAX as usize;
/// What is kept for a version of an answer, besides the version itself.
const VERSION_BYTES: u64 = 16;
/// An answer up to this part of the pool is charged with all of its bytes.
const MODERATE_PART: u64 = 64;
/// A piece waits so long for its turn in the pool, and then is made on the event loop.
const TURN_PATIENCE: Duration = Duration::from_secs(1);
/// So many versions are let go of where they are.
const LET_GO_HERE_MAX: usize = 256;
/// Between two looks at what a view keeps.
const LOOK: Duration = Duration::from_secs(1);

/// How much of what was freed since the oldest of them all views together may keep: a quarter of the pool of answers.
pub(super) fn kept_max(pool: &Pool) -> u64 {
    pool.max() / 4
}

/// Resolves when a view that was made when `freed` bytes had been freed may keep more than `max`.
pub(super) async fn outdated(node: &Node, freed: u64, max: u64) {
    while node.freed_bytes().saturating_sub(freed) <= max {
        sleep(LOOK).await;
    }
    tracing::warn!(max, "a client did not take its answer before much of it was overwritten; given up");
}

fn too_slow(max: u64) -> Error {
    Error::AnswerTooLarge(format!(
        "the answer was not taken before {max} bytes of the state were overwritten and compacted (a quarter of \
         limits.answer_bytes_max, as far as the memory limit allows it); read faster, or in smaller parts"
    ))
}

/// What is left of an answer.
enum Rest {
    Whole(LargeAnswer),
    Pieces(Pieces),
    GivenUp(Error),
}

impl Rest {
    fn versions(&self) -> usize {
        match self {
            Self::Whole(answer) => answer.versions(),
            Self::Pieces(pieces) => pieces.versions_left(),
            Self::GivenUp(_) => 0,
        }
    }
}

/// A large answer, which is let go of where nobody waits for it: for each version that takes a look at memory that nothing else has
/// touched for a while, and a client that leaves may leave a hundred such answers behind.
pub struct Aside {
    env: Env,
    rest: Rest,
    /// What is kept for it, if it has a place already.
    kept: Option<Arc<Taken>>,
}

impl Aside {
    pub fn new(env: &Env, answer: LargeAnswer) -> Self {
        Self { env: env.clone(), rest: Rest::Whole(answer), kept: None }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if self.rest.versions() > LET_GO_HERE_MAX {
            let rest = std::mem::replace(&mut self.rest, Rest::Pieces(Pieces::default()));
            self.env.drop_large((rest, self.kept.take()));
        }
    }
}

/// An answer that is to be written in pieces.
#[derive(Clone)]
pub struct Large {
    answer: Arc<Mutex<Aside>>,
    /// What is kept for it, until the last piece is made.
    kept: Arc<Taken>,
    /// As a message.
    bytes: usize,
    turns: Turns,
}

impl Large {
    /// `bytes`: as a message.
    pub fn new(mut answer: Aside, bytes: usize, kept: Taken, turns: Turns) -> Self {
        let kept = Arc::new(kept);
        answer.kept = Some(kept.clone());
        Self { answer: Arc::new(Mutex::new(answer)), kept, bytes, turns }
    }

    /// What is taken for it; its pieces are to be taken there, too.
    pub fn taken(&self) -> Arc<Taken> {
        self.kept.clone()
    }

    /// Its pieces in the form that `write` gives, which is told the bytes that it has as a message.
    pub fn written(self, making: Making, write: fn(LargeAnswer, usize) -> Pieces) -> Written {
        Written { large: self, write, making, has_begun: false, next: None }
    }

    /// The next piece in the form that `write` gives; always the same one for an answer.
    fn next_piece(&self, write: fn(LargeAnswer, usize) -> Pieces) -> Option<Result<Bytes, Error>> {
        let rest = &mut self.answer.lock().rest;
        if let Rest::Whole(answer) = rest {
            let answer = std::mem::take(answer);
            *rest = Rest::Pieces(write(answer, self.bytes));
        }
        match rest {
            Rest::Pieces(pieces) => pieces.next().map(Ok),
            Rest::GivenUp(error) => Some(Err(error.clone())),
            Rest::Whole(_) => None,
        }
    }
}

/// Where the pieces of an answer are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Making {
    /// On the event loop: a piece is hardly more than a copy.
    Here,
    /// In the pool of long reads, in its client's turns.
    Apart,
}

/// A large answer on its way to a client.
///
/// An answer of one piece, as most are, is written at once; each piece of a larger one in its turn. A client on a fast network takes piece
/// after piece, and each step of a small request would wait for a piece of each of a hundred such clients.
pub struct Written {
    large: Large,
    write: fn(LargeAnswer, usize) -> Pieces,
    making: Making,
    has_begun: bool,
    next: Option<BoxFuture<'static, Option<Result<Bytes, Error>>>>,
}

impl Written {
    fn make(&self) -> BoxFuture<'static, Option<Result<Bytes, Error>>> {
        let (large, write) = (self.large.clone(), self.write);
        let asker = large.kept.client().asker();
        match self.making {
            Making::Here => Box::pin(async move {
                large.turns.next(asker).await;
                large.next_piece(write)
            }),
            Making::Apart => {
                let env = large.answer.lock().env.clone();
                let apart = large.clone();
                Box::pin(async move {
                    let deadline = Instant::now() + TURN_PATIENCE;
                    let piece = move || apart.next_piece(write);
                    match env.long_for(env::Pool::Reads, asker, deadline, piece).await {
                        Ok(piece) => piece,
                        // No place in the pool, or no turn in time: nothing was made.
                        Err(_) => {
                            large.turns.next(asker).await;
                            large.next_piece(write)
                        }
                    }
                })
            }
        }
    }
}

impl Stream for Written {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if !std::mem::replace(&mut this.has_begun, true)
            && this.large.bytes <= PIECE_BYTES
            && this.making == Making::Here
        {
            return Poll::Ready(this.large.next_piece(this.write));
        }
        if this.next.is_none() {
            this.next = Some(this.make());
        }
        let made = ready!(this.next.as_mut().expect("it was begun").as_mut().poll(cx));
        this.next = None;
        Poll::Ready(made)
    }
}

/// Gives an answer up when it keeps too much.
async fn give_up(node: Node, freed: u64, max: u64, answer: Weak<Mutex<Aside>>) {
    let shutdown = node.env().shutdown.clone();
    let gone = async {
        while answer.strong_count() > 0 {
            sleep(LOOK).await;
        }
    };
    tokio::select! {
        () = outdated(&node, freed, max) => {
            if let Some(answer) = answer.upgrade() {
                let kept = std::mem::replace(&mut answer.lock().rest, Rest::GivenUp(too_slow(max)));
                node.env().drop_large(kept);
            }
        }
        () = gone => {}
        () = shutdown.cancelled() => {}
    }
}

/// An answer as it was read.
pub(super) struct Made<M> {
    answer: M,
    bytes: usize,
    /// What had been freed of the state then.
    freed: u64,
}

impl<M: prost::Message> Made<M> {
    /// Looks at all of the answer, so it is to be made where it was read.
    pub(super) fn new(answer: M, freed: u64) -> Self {
        Self { bytes: answer.encoded_len(), answer, freed }
    }
}

impl Api {
    /// The answer of a read; `make` reads it, again if it had to wait for room. `own`: how many bytes it may have if its versions are
    /// not the store's, as of keys alone. `versions`: how many are found for it at most, if that is many: so long as it waits for its turn to be
    /// read it takes what these take, and what finds no room is not read in vain.
    pub(super) async fn read_answer<M: prost::Message + Default, F: Future<Output = Result<Made<M>, Error>>>(
        &self,
        node: &Node,
        own: Option<u64>,
        versions: u64,
        make: impl Fn() -> F,
        large: fn(M) -> LargeAnswer,
    ) -> Result<Response<M>, Error> {
        let ahead =
            own.filter(|bytes| *bytes > COPIED_BYTES_MAX).unwrap_or(0).max(versions.saturating_mul(VERSION_BYTES));
        let ahead = match ahead {
            0 => None,
            bytes => Some(Box::pin(self.take_ahead(node, bytes)).await?),
        };
        let made = make().await?;
        if made.bytes < LARGE_BYTES {
            return Ok(Response::new(made.answer));
        }
        // Apart: the small answers' futures are no larger for it.
        Box::pin(self.large_answer(node, made, ahead, own.is_some(), make, large)).await
    }

    /// An answer of so many bytes, in so many versions that are none of the store's; `make` copies it apart, once there is room for it.
    pub(super) async fn own_answer<M: Default>(
        &self,
        node: &Node,
        (bytes, versions): (usize, usize),
        make: impl FnOnce() -> LargeAnswer + Send + 'static,
    ) -> Result<Response<M>, Error> {
        let kept_bytes = self.kept_bytes(bytes, versions, true)?;
        let pool = &self.shared.account.answers;
        let kept = pool.take_in_time(node.client(), kept_bytes, node.options().request_timeout).await?;
        let env = node.env().clone();
        let answer = node.long(env::Pool::Reads, move || Aside::new(&env, make())).await?;
        Ok(self.placed(node, (answer, bytes), node.freed_bytes(), kept))
    }

    /// What an answer is charged with until it is made, of which so many bytes at most are copied or found. They may be many times those
    /// that it has, and no answer is refused for that; so those that may be the largest are made one after the other.
    async fn take_ahead(&self, node: &Node, bytes: u64) -> Result<Taken, Error> {
        let pool = &self.shared.account.answers;
        pool.take_in_time(node.client(), bytes.min(pool.max() / 2), node.options().request_timeout).await
    }

    /// `ahead`: what was taken for it until it was made. Nobody gets that in between, so few answers are made twice.
    async fn large_answer<M: prost::Message + Default, F: Future<Output = Result<Made<M>, Error>>>(
        &self,
        node: &Node,
        made: Made<M>,
        ahead: Option<Taken>,
        is_own: bool,
        make: impl Fn() -> F,
        large: fn(M) -> LargeAnswer,
    ) -> Result<Response<M>, Error> {
        let aside = |answer| Aside::new(node.env(), large(answer));
        let (answer, bytes, freed) = (aside(made.answer), made.bytes, made.freed);
        let kept_bytes = self.kept_bytes(bytes, answer.rest.versions(), is_own)?;
        let pool = &self.shared.account.answers;
        let taken = ahead.unwrap_or_else(|| pool.nothing(node.client()));
        if taken.resize(kept_bytes).is_ok() {
            return Ok(self.placed(node, (answer, bytes), freed, taken));
        }
        drop((answer, taken));
        let kept = pool.take_in_time(node.client(), kept_bytes, node.options().request_timeout).await?;
        let made = make().await?;
        Ok(self.placed(node, (aside(made.answer), made.bytes), made.freed, kept))
    }

    /// The answer of a write, which cannot be made again; `large` says which kind it is.
    pub(super) async fn write_answer<M: prost::Message + Default>(
        &self,
        node: &Node,
        answer: M,
        large: fn(M) -> LargeAnswer,
    ) -> Result<Response<M>, Error> {
        let bytes = answer.encoded_len();
        if bytes < LARGE_BYTES {
            return Ok(Response::new(answer));
        }
        let freed = node.freed_bytes();
        let answer = Aside::new(node.env(), large(answer));
        let kept_bytes = self.kept_bytes(bytes, answer.rest.versions(), false)?;
        let patience = node.options().request_timeout;
        let kept = Box::pin(self.shared.account.answers.take_in_time(node.client(), kept_bytes, patience)).await?;
        Ok(self.placed(node, (answer, bytes), freed, kept))
    }

    /// What an answer is charged with, or a refusal of what can never be sent.
    fn kept_bytes(&self, bytes: usize, versions: usize, is_own: bool) -> Result<u64, Error> {
        let pool = &self.shared.account.answers;
        let references = versions as u64 * VERSION_BYTES;
        let kept_bytes = match bytes as u64 {
            bytes if is_own => bytes + 2 * references,
            bytes if bytes <= pool.max() / MODERATE_PART => bytes.max(references),
            _ => references,
        };
        let max = pool.max() / 2;
        if bytes <= ANSWER_BYTES_MAX && kept_bytes <= max {
            return Ok(kept_bytes);
        }
        Err(Error::AnswerTooLarge(format!(
            "the answer has {bytes} bytes and would keep {kept_bytes}, expected at most {ANSWER_BYTES_MAX} and {max} (half of \
             limits.answer_bytes_max, as far as the memory limit allows it); ask for it in parts, with limit, or by RangeStream"
        )))
    }

    /// The answer of so many bytes beside an empty message. `freed`: what had been freed of the state when it was made.
    fn placed<M: Default>(&self, node: &Node, (answer, bytes): (Aside, usize), freed: u64, kept: Taken) -> Response<M> {
        let is_charged = bytes as u64 <= kept.amount();
        let large = Large::new(answer, bytes, kept, self.shared.turns.clone());
        if !is_charged {
            let max = kept_max(&self.shared.account.answers);
            node.env().clone().spawn(give_up(node.clone(), freed, max, Arc::downgrade(&large.answer)));
        }
        let mut response = Response::new(M::default());
        response.extensions_mut().insert(large);
        response
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::StreamExt as _;

    use super::super::turns::tests::count;
    use super::*;
    use crate::node::Client;
    use crate::node::account::Kind;
    use crate::pb::pieces::tests::some_answer;

    #[test]
    fn an_answer_that_is_given_up_keeps_nothing_and_says_so() {
        let pool = Pool::new(Kind::Answers, 100);
        let mut random = fastrand::Rng::with_seed(7);
        for begun in [false, true] {
            let answer = some_answer(&mut random);
            let bytes = answer.encoded_len();
            let large = Large::new(
                Aside::new(&Env::real(), answer),
                bytes,
                pool.take(&Client::new(None), 10).unwrap(),
                Turns::new(&Env::real()),
            );
            if begun {
                large.next_piece(LargeAnswer::in_grpc).unwrap().unwrap();
            }
            large.answer.lock().rest = Rest::GivenUp(too_slow(1));
            assert_eq!(large.next_piece(LargeAnswer::in_grpc), Some(Err(too_slow(1))));
        }
        assert_eq!(pool.taken(), 0);
    }

    #[tokio::test]
    async fn between_two_pieces_of_an_answer_all_that_is_ready_has_its_turn() {
        let pool = Pool::new(Kind::Answers, 100);
        let mut random = fastrand::Rng::with_seed(fastrand::u64(..));
        let turns = Arc::new(AtomicU64::new(0));
        tokio::spawn(count(turns.clone()));
        let mut pieces = 0;
        while pieces < 50 {
            let kept = pool.take(&Client::new(None), 10).unwrap();
            let answer = some_answer(&mut random);
            let (bytes, answer) = (answer.encoded_len(), Aside::new(&Env::real(), answer));
            let mut written =
                Large::new(answer, bytes, kept, Turns::new(&Env::real())).written(Making::Here, LargeAnswer::in_grpc);
            written.next().await;
            let mut before = turns.load(Ordering::Relaxed);
            while written.next().await.is_some() {
                let now = turns.load(Ordering::Relaxed);
                assert!(now > before, "after {pieces} pieces");
                (before, pieces) = (now, pieces + 1);
            }
        }
    }

    #[tokio::test]
    async fn pieces_come_though_the_pool_that_makes_them_is_full_of_other_clients_reads() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let env = Env::real();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let mut others = Vec::new();
        let mut is_refused = |host| {
            let held = held.clone();
            let (read, asker) = (move || held.lock().recv().is_err(), env::Asker { host, connection: 1 });
            let mut read =
                Box::pin(env.long_for(env::Pool::Reads, asker, Instant::now() + Duration::from_secs(600), read));
            let refused = futures_util::FutureExt::now_or_never(&mut read).is_some();
            if !refused {
                others.push(read);
            }
            refused
        };
        // The first ones have the threads, which may not be at work yet when the others come; so a few more than fit into the queue.
        assert!((1..5000).any(&mut is_refused), "the pool never refuses");
        let pool = Pool::new(Kind::Answers, 1 << 30);
        for _ in 0..20 {
            let answer = some_answer(&mut random);
            let (bytes, expected) = (answer.encoded_len(), answer.clone().in_grpc(answer.encoded_len()));
            let kept = pool.take(&Client::new(None), 10).unwrap();
            let large = Large::new(Aside::new(&env, answer), bytes, kept, Turns::new(&env));
            let written: Vec<_> = large.written(Making::Apart, LargeAnswer::in_grpc).collect().await;
            assert_eq!(written, expected.map(Ok).collect::<Vec<_>>());
        }
        drop(release);
        for one in others {
            let _ = one.await;
        }
    }
}
