//! Who uses the members, and what is judged of what they were told. Absent: the users (`testing::users`) and the checkers themselves.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use quorate::testing::history::{Action, Answer, Effect, Kv, Outcome, Recorder, Request, Span};
use quorate::testing::users::{self, Client, Clients, Dialing, Lessee, Seen, Stories, Watcher};
use quorate::testing::verdict::{self, Violation};
use quorate::testing::watch::{Message, Watched};
use quorate::testing::{history, lease};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::cluster::wait_for;

/// What two looks at one clock may be apart by rounding.
const CLOCK_ERROR: Duration = Duration::from_millis(5);
/// Between two requests of a client: members and clients share the machine.
const PAUSE: Duration = Duration::from_millis(25);
const LESSEES: u64 = 2;

/// All users of a cluster.
pub struct Crowd {
    pub clients: Clients,
    pub recorder: Recorder,
    size: usize,
    seen: Seen,
    stories: Stories,
    using: CancellationToken,
    users: Vec<JoinHandle<()>>,
    watching: CancellationToken,
    watchers: Vec<JoinHandle<()>>,
}

impl Crowd {
    /// Of `size` members, whose `host:port` for clients `address` knows.
    pub fn new(size: usize, address: impl Fn(usize) -> Option<String> + Clone + Send + 'static) -> Self {
        let dial = move |member: usize| -> Dialing {
            let address = address(member).ok_or(std::io::ErrorKind::ConnectionRefused);
            Box::pin(async move {
                let stream = TcpStream::connect(address?).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as _)
            })
        };
        Self {
            clients: Clients::new(size, dial),
            recorder: Recorder::default(),
            size,
            seen: Seen::default(),
            stories: Stories::default(),
            using: CancellationToken::new(),
            users: Vec::new(),
            watching: CancellationToken::new(),
            watchers: Vec::new(),
        }
    }

    /// Clients and lessees, and watchers from the first revision on.
    pub fn start(&mut self, rng: &mut fastrand::Rng, clients: u64) {
        let members = watch::Sender::new(self.size);
        for name in 0..clients {
            let client = Client {
                name,
                env: users::env(rng.u64(..)),
                clients: self.clients.clone(),
                recorder: self.recorder.clone(),
                members: members.subscribe(),
                pause: PAUSE,
            };
            self.users.push(tokio::spawn(client.run(self.using.clone())));
        }
        let begun = quorate::env::Instant::now();
        for name in 0..LESSEES {
            let lessee = Lessee {
                name: 50 + name,
                env: users::env(rng.u64(..)),
                clients: self.clients.clone(),
                recorder: self.recorder.clone(),
                members: members.subscribe(),
                stories: self.stories.clone(),
                begun,
            };
            self.users.push(tokio::spawn(lessee.run(self.using.clone())));
        }
        // Everything; one key; and the deletions of some.
        for (span, puts) in [(all(), true), (Span::one("a"), true), (Span::range("b", "e"), false)] {
            let watcher = Watcher {
                name: self.seen.add_watcher(),
                env: users::env(rng.u64(..)),
                clients: self.clients.clone(),
                members: members.subscribe(),
                seen: self.seen.clone(),
                span,
                puts,
                is_ahead: false,
            };
            self.watchers.push(tokio::spawn(watcher.run(self.watching.clone())));
        }
    }

    pub fn spawn(&mut self, user: impl Future<Output = ()> + Send + 'static) {
        self.users.push(tokio::spawn(user));
    }

    /// Ends when the users are to.
    pub fn stopping(&self) -> CancellationToken {
        self.using.clone()
    }

    /// Asks until there is an answer.
    pub async fn ask(&self, member: usize, request: Request) -> Answer {
        wait_for(&format!("member {member} to answer {request}"), async || {
            match self.clients.recorded(&self.recorder, 100 + member as u64, member, request.clone()).await {
                Outcome::Answered(answer) => Ok(answer),
                other => Err(other.to_string()),
            }
        })
        .await
    }

    /// What the keys of a span are: the newest, read through a member, and then what that member itself holds.
    pub async fn read_twice(&self, member: usize, span: Span) -> [Vec<Kv>; 2] {
        let newest = self.ask(member, Request::Do(Action::Get(span.clone()))).await;
        let own = self.ask(member, Request::GetLocal(span)).await;
        [newest, own].map(|answer| match answer.effects.into_iter().next() {
            Some(Effect::Got(kvs)) => kvs,
            other => panic!("a read is answered with {other:?}"),
        })
    }

    /// Ends the users, and waits for the ends of their leases: nothing changes then.
    pub async fn stop(&mut self) {
        self.using.cancel();
        for user in self.users.drain(..) {
            user.await.expect("a user only writes down what it is told");
        }
        wait_for("the leases to end", async || {
            let left = self.ask(0, Request::Do(Action::Get(Span::range("l", "m")))).await;
            if left.effects == [Effect::Got(Vec::new())] { Ok(()) } else { Err(format!("{:?}", left.effects)) }
        })
        .await;
    }

    /// Judges a cluster that is whole again and that nobody uses any more, but for the watchers, who come to their end.
    pub async fn judge(mut self, run: &str) -> Result<(), Violation> {
        let mut newest = 0;
        let mut states = Vec::new();
        for member in 0..self.size {
            newest = self.ask(member, Request::Do(Action::Get(Span::one("a")))).await.revision;
            states.extend(self.read_twice(member, all()).await);
        }
        if let Some(other) = states.iter().find(|state| **state != states[0]) {
            let differ = states[0].iter().zip(other).find(|(one, other)| one != other);
            let what = format!("{} keys and {}, first difference: {differ:?}", states[0].len(), other.len());
            return Err(Violation::new("members agree", what));
        }
        println!("members hold the same {} keys at revision {newest}", states[0].len());
        wait_for("the watchers to come to the end", async || {
            let reached = self.seen.reached();
            if reached.iter().all(|reached| *reached >= newest) {
                Ok(())
            } else {
                Err(format!("{reached:?} of {newest}"))
            }
        })
        .await;
        self.watching.cancel();
        for watcher in self.watchers.drain(..) {
            watcher.await.expect("a watcher only writes down what it is told");
        }
        self.seen.complete_to(newest);
        wait_for("equal hashes", async || {
            let mut hashes = Vec::new();
            for member in 0..self.size {
                hashes.push(self.clients.hash(member).await.map_err(|status| status.to_string()));
            }
            if hashes.iter().all(|hash| hash.is_ok() && *hash == hashes[0]) {
                Ok(())
            } else {
                Err(format!("{hashes:x?}"))
            }
        })
        .await;
        self.judge_records(run)
    }

    fn judge_records(&self, run: &str) -> Result<(), Violation> {
        let (ops, streams, stories) = (self.recorder.ops(), self.seen.streams(), self.stories.all());
        print_counts(&ops, &streams);
        let over =
            stories.values().filter(|story| matches!(story.steps.last(), Some(lease::Step::Gone { .. }))).count();
        println!("leases: {}, seen to their end: {over}", stories.len());
        lease::check(&stories, &[], CLOCK_ERROR).map_err(|broken| Violation::new("lease", broken.to_string()))?;
        let begun = Instant::now();
        match verdict::history(run, &ops, &streams)? {
            Some(steps) => println!("linearizable, and the watches are of it: {steps} steps, {:.1?}", begun.elapsed()),
            None => return Err(Violation::new("linearizable", "undecided: the search took too many steps")),
        }
        Ok(())
    }
}

/// Every key of the users.
pub fn all() -> Span {
    Span::range("\0", "\x7f")
}

fn print_counts(ops: &[history::Op], streams: &[Watched]) {
    let mut by_kind = BTreeMap::<&str, u64>::new();
    let mut by_outcome = [0; 3];
    for op in ops {
        let kind = match &op.request {
            Request::Do(Action::Put { .. }) => "puts",
            Request::Do(Action::Delete(_)) => "deletes",
            Request::Do(Action::Get(_)) => "reads",
            Request::Txn { .. } => "transactions",
            Request::GetAt(..) => "reads at a revision",
            Request::GetLocal(_) => "serializable reads",
            Request::Compact(_) => "compactions",
        };
        *by_kind.entry(kind).or_default() += 1;
        by_outcome[match &op.outcome {
            Outcome::Answered(_) => 0,
            Outcome::Refused(_) => 1,
            Outcome::Unknown => 2,
        }] += 1;
    }
    let kinds: Vec<String> = by_kind.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let [answered, refused, unknown] = by_outcome;
    println!("operations: {} ({})", ops.len(), kinds.join(", "));
    println!("answered: {answered}, without effect: {refused}, of unknown outcome: {unknown}");
    let events: usize = streams
        .iter()
        .flat_map(|stream| &stream.messages)
        .map(|message| if let Message::Events { events, .. } = message { events.len() } else { 0 })
        .sum();
    println!("watches: {} streams, {events} events", streams.len());
}
