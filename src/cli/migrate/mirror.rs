//! `mirror`: keeps the keys of a prefix the same as those of another one, in the same cluster or in another.
//!
//! First both sides are compared, key by key, and the target is put right; then each change of the source follows, until told to stop. When
//! a side is lost, or the source has compacted what was not seen, both are compared anew. So whatever happened meanwhile, the target ends
//! as the source is; and of memory it takes no more than a page of each.
//! Invariants: the source is only read; in the target nothing outside of its prefix is touched, and what was there before only with
//! `--overwrite`. Absent: leases, revisions and versions; a mirrored key goes when the source's does.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use anyhow::{bail, ensure};
use bytes::Bytes;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::follow::{Compacted, Follower};
use super::target::{Change, OPS_MAX, Rename, Target};
use super::verify::Walk;
use super::{Side, SourceArgs, TICK, TargetArgs};
use crate::cli::output::{Format, json_line};
use crate::cli::progress::{Progress, Unit};
use crate::env::sleep;
use crate::pb::KeyValue;

/// After a side was lost; doubled each time, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

#[derive(Debug, clap::Args)]
pub struct MirrorArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Keys that begin so [default: all]
    #[arg(long, default_value = "")]
    prefix: OsString,
    /// What their names begin with at the target [default: the same]
    #[arg(long, value_name = "PREFIX")]
    to_prefix: Option<OsString>,
    /// Change and delete keys that the target has under its prefix, where the source's are others
    #[arg(long)]
    overwrite: bool,
    /// End as soon as the target holds what the source held a moment before, instead of following it until Ctrl-C
    #[arg(long)]
    until_synced: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    target: TargetArgs,
}

struct Mirror {
    args: MirrorArgs,
    rename: Rename,
    /// The revision of the source that the target holds; 0: none yet.
    held: i64,
}

pub async fn mirror(args: MirrorArgs) -> anyhow::Result<Vec<u8>> {
    let from = Bytes::copy_from_slice(args.prefix.as_bytes());
    let to = args.to_prefix.as_ref().map_or(from.clone(), |prefix| Bytes::copy_from_slice(prefix.as_bytes()));
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut mirror = Mirror { args, rename: Rename { from, to }, held: 0 };
    tokio::select! {
        done = mirror.run() => done?,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    ensure!(mirror.held > 0, "ended before the target held all of the source's keys; run it again to go on");
    Ok(match mirror.args.output {
        Format::Simple => format!("the target holds the source's revision {}\n", mirror.held).into_bytes(),
        Format::Json => json_line(&json!({ "revision": mirror.held })),
    })
}

impl Mirror {
    /// Returns when the target is as the source was, if that is what is wanted; else never but with an error at the start.
    async fn run(&mut self) -> anyhow::Result<()> {
        let mut pause = RETRY.0;
        loop {
            let before = self.held;
            let lost = match self.once().await {
                Ok(()) => return Ok(()),
                // Where it has never worked a person must look.
                Err(error) if self.held == 0 => return Err(error),
                Err(error) => error,
            };
            pause = if self.held > before { RETRY.0 } else { (pause * 2).min(RETRY.1) };
            eprintln!("quorate: {lost:#}; both sides are compared anew in {}", humantime::format_duration(pause));
            sleep(pause).await;
        }
    }

    /// Compares, and follows until something is lost.
    async fn once(&mut self) -> anyhow::Result<()> {
        let (source, target) = (self.args.source.client(&self.args.target), self.args.target.client());
        let from = Side::connect("source", source, &self.rename.from).await?;
        let to = Side::connect("target", target, &self.rename.to).await?;
        if self.held == 0 {
            self.check(&from, &to).await?;
        }
        let mut follower = Follower::new(from, Target::renamed(to, self.rename.clone()));
        loop {
            follower.applied = self.reconcile(&follower).await?;
            self.held = follower.applied;
            if self.args.until_synced {
                return Ok(());
            }
            eprintln!("the target holds the source's revision {}; following it until Ctrl-C", self.held);
            match self.follow(&mut follower).await {
                Err(error) if error.is::<Compacted>() => eprintln!("quorate: {error}"),
                other => return other,
            }
        }
    }

    /// Refuses what would write over what it reads, or over what nobody said may go.
    async fn check(&self, from: &Side, to: &Side) -> anyhow::Result<()> {
        let (one, other) = (&self.rename.from[..], &self.rename.to[..]);
        let overlap = one.starts_with(other) || other.starts_with(one);
        if overlap && from.cluster_id().await? == to.cluster_id().await? {
            bail!(
                "--from and --to are of the same cluster, and the prefixes overlap: it would follow its own writes; give --to-prefix another one"
            );
        }
        let (present, _) = to.count().await?;
        ensure!(
            present == 0 || self.args.overwrite,
            "the target holds {present} keys under that prefix already; name another --to-prefix, or say --overwrite to make them as the source's"
        );
        Ok(())
    }

    async fn follow(&mut self, follower: &mut Follower) -> anyhow::Result<()> {
        loop {
            // Nothing ends it; what was applied so far is kept in any case.
            let lost = follower.watch(&mut None).await;
            self.held = follower.applied;
            let reason = lost?.unwrap_or_else(|| "the watch has ended".to_owned());
            eprintln!("quorate: the watch was lost ({reason}); it goes on from revision {}", self.held + 1);
            sleep(TICK).await;
        }
    }

    /// Makes the target's keys those of the source as of one revision, which it returns.
    async fn reconcile(&self, follower: &Follower) -> anyhow::Result<i64> {
        let (count, revision) = follower.from.count().await?;
        let mut progress = Progress::new("comparing keys", Unit::Things, Some(count.max(0) as u64));
        let (mut ours, mut theirs) = (Walk::new(&follower.from, revision), Walk::new(follower.to.side(), 0));
        let (mut changes, mut seen) = (Vec::new(), 0);
        loop {
            ours.fill().await?;
            theirs.fill().await?;
            let order = match (ours.found.front(), theirs.found.front()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(ours), Some(theirs)) => self.rename.key(ours.key()).as_ref().cmp(theirs.key()),
            };
            let ours = if order.is_le() { ours.found.pop_front() } else { None };
            let theirs = if order.is_ge() { theirs.found.pop_front() } else { None };
            seen += u64::from(ours.is_some());
            changes.extend(self.change(ours, theirs));
            if changes.len() >= OPS_MAX {
                follower.to.apply(std::mem::take(&mut changes).into_iter()).await?;
            }
            progress.at(seen);
        }
        follower.to.apply(changes.into_iter()).await?;
        Ok(revision)
    }

    /// What makes the target's key the source's.
    fn change(&self, ours: Option<KeyValue>, theirs: Option<KeyValue>) -> Option<Change> {
        match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours.value() == theirs.value() && theirs.lease() == 0 => None,
            (Some(ours), _) => Some(Change::Put(ours)),
            (None, Some(theirs)) => Some(Change::Delete(KeyValue::tombstone(
                &self.rename.key_at_source(theirs.key()),
                theirs.mod_revision(),
            ))),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_takes_the_place_of_another() {
        let rename = Rename { from: "a/".into(), to: "b/c/".into() };
        assert_eq!((&rename.key(b"a/x")[..], &rename.key_at_source(b"b/c/x")[..]), (&b"b/c/x"[..], &b"a/x"[..]));
        let rename = Rename { from: "".into(), to: "copy/".into() };
        assert_eq!((&rename.key(b"a")[..], &rename.key_at_source(b"copy/a")[..]), (&b"copy/a"[..], &b"a"[..]));
    }
}
