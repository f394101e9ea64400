//! What must hold when the faults are over: of the history that the clients wrote down, and of the members themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use super::world::World;
use super::{Run, Violation};
use crate::env::{Instant, sleep};
use crate::identity::slot_of;
use crate::testing::history::{Action, Effect, Op, Outcome, Request, Span};
use crate::testing::watch::Message;
use crate::testing::{lease, session, verdict};

/// A TTL (4 s at most) and what an election adds are over long before.
const LEASES_END: Duration = Duration::from_secs(20);

/// There is one simulated clock; what is left is its grain.
const CLOCK_ERROR: Duration = Duration::from_millis(5);

/// Heals the network, waits until the cluster is whole, and judges.
pub(super) async fn judge(world: &mut World) -> Run {
    world.net.mend();
    world.wait_healed().await?;
    leases_end(world).await?;
    let everything = Span::range("\0", "z");
    let mut newest_revision = 0;
    for member in 0..world.size() {
        // Linearizable, and so the newest; then what the member itself holds.
        let newest = world.ask(member, Request::Do(Action::Get(everything.clone()))).await;
        let local = world.ask(member, Request::GetLocal(everything.clone())).await;
        let (Outcome::Answered(all), true) = (&newest, newest == local) else {
            return Err(Violation::new("members agree", format!("member {member}: {newest}, but itself: {local}")));
        };
        newest_revision = all.revision;
    }
    world.stop_watchers(newest_revision).await?;
    hashes(world).await?;
    members(world).await?;
    let ops = world.recorder.ops();
    tally(world, &ops);
    let stories = world.stories.all();
    world.count("leases", stories.len() as u64);
    let outages = world.outages.clone();
    world.count("outages", outages.len() as u64);
    let in_outage = |due: Duration| outages.iter().any(|outage| (outage.from..outage.to).contains(&due));
    world.count("leases due in an outage", stories.values().filter(|story| in_outage(story.due())).count() as u64);
    if let Err(broken) = lease::check(&stories, &outages, CLOCK_ERROR) {
        return Err(Violation::new("lease", broken.to_string()));
    }
    if let Err(broken) = session::check(&ops, &world.starts) {
        return Err(Violation::new("session", broken.to_string()));
    }
    history(world, &ops)
}

/// Every lease ends once nobody keeps it alive, and then nothing changes any more.
async fn leases_end(world: &mut World) -> Run {
    let deadline = Instant::now() + LEASES_END;
    loop {
        let left = world.ask(world.any_member(), Request::Do(Action::Get(Span::range("l", "m")))).await;
        match left {
            Outcome::Answered(answer) if answer.effects == [Effect::Got(Vec::new())] => return Ok(()),
            left if Instant::now() > deadline => {
                let what = format!("after {LEASES_END:?} without a client: {left}");
                return Err(Violation::new("lease ends", what));
            }
            _ => sleep(Duration::from_millis(250)).await,
        }
    }
}

async fn hashes(world: &mut World) -> Run {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut hashes = Vec::new();
        for member in 0..world.size() {
            hashes.push(world.clients.hash(member).await.map_err(|status| status.to_string()));
        }
        if hashes.iter().all(Result::is_ok) && hashes.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Violation::new("equal hashes", format!("{hashes:x?}")));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// One member a slot, every machine in the membership, nobody else; and a crash has made nobody a new member.
async fn members(world: &mut World) -> Run {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let mut problems = Vec::new();
        for member in 0..world.size() {
            let Ok(list) = world.clients.members(member).await else {
                problems.push(format!("member {member} does not list members"));
                continue;
            };
            let mut by_slot: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
            for id in &list {
                by_slot.entry(slot_of(*id)).or_default().push(*id);
            }
            if by_slot.len() != world.size() || by_slot.values().any(|ids| ids.len() != 1) {
                problems.push(format!("member {member} lists {by_slot:x?}"));
            }
        }
        if problems.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            return Err(Violation::new("one member a slot", problems.join("; ")));
        }
        sleep(Duration::from_millis(200)).await;
    }
    for member in 0..world.size() {
        let selves = world.selves(member);
        if selves != 1 && !world.machines[member].was_renewed {
            let what = format!("member {member} has {selves} selves, though it had no reason to become another");
            return Err(Violation::new("identity kept", what));
        }
    }
    Ok(())
}

fn tally(world: &mut World, ops: &[Op]) {
    for op in ops {
        let outcome = match &op.outcome {
            Outcome::Answered(_) => "answered",
            Outcome::Refused(_) => "refused",
            Outcome::Unknown => "of unknown outcome",
        };
        let kind = match &op.request {
            Request::Do(Action::Put { .. }) => "put",
            Request::Do(Action::Delete(_)) => "delete",
            Request::Do(Action::Get(_)) => "get",
            Request::Txn { .. } => "txn",
            Request::GetAt(..) => "get at a revision",
            Request::GetLocal(_) => "serializable get",
            Request::Compact(_) => "compact",
        };
        world.count(&format!("ops {outcome}"), 1);
        world.count(&format!("op: {kind}"), 1);
        let seen = op.answer().into_iter().flat_map(|answer| &answer.effects);
        world.count("versions read", seen.map(|e| if let Effect::Got(kvs) = e { kvs.len() as u64 } else { 0 }).sum());
    }
}

fn history(world: &mut World, ops: &[Op]) -> Run {
    let streams = world.seen.streams();
    for message in streams.iter().flat_map(|stream| &stream.messages) {
        match message {
            Message::Progress(_) => world.count("watch bookmarks", 1),
            Message::Events { events, .. } => world.count("watch events", events.len() as u64),
        }
    }
    world.count("watch streams", streams.len() as u64);
    match verdict::history(&format!("seed {}", world.seed), ops, &streams)? {
        Some(steps) => world.count("checker steps", steps),
        None => world.count("undecided by the checker", 1),
    }
    Ok(())
}
