//! `lock` and `elect`: hold something while a command, or this program, runs.
//!
//! Owns a lease of its own and keeps it alive. Invariants: however this program ends by itself or by a signal, the lease is
//! revoked, so that the next in line waits no longer; if the lease is lost, the command is told to end, for it holds nothing any
//! more. Absent: any promise after SIGKILL but the lease's end.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use futures_util::StreamExt as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::client::{ClientArgs, failure};
use super::lease::{keep, seconds};
use super::output::{Format, Lines, base64, json_line};
use super::print;
use crate::cli::credentials::Channel;
use crate::config::units::duration;
use crate::env::{sleep, timeout};
use crate::pb::election::election_client::ElectionClient;
use crate::pb::election::{CampaignRequest, LeaderRequest, LeaderResponse};
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::{LeaseGrantRequest, LeaseRevokeRequest, RangeRequest};
use crate::pb::lock::LockRequest;
use crate::pb::lock::lock_client::LockClient;

/// After a member that could not answer, before another is asked.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Longest wait for the lease to be revoked at the end; it ends by itself.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub struct LockArgs {
    name: OsString,
    /// How long the lock stays taken if this program dies without a word
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration::parse)]
    ttl: Duration,
    /// Runs while the lock is held, with QUORATE_LOCK_KEY and QUORATE_LOCK_REVISION (the fencing token) in its environment; its
    /// exit code is passed on. Left out: prints the key, and holds the lock until Ctrl-C
    #[arg(last = true)]
    command: Vec<OsString>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct ElectArgs {
    name: OsString,
    /// What to proclaim when elected; printed with the key, then leadership is held until Ctrl-C
    #[arg(required_unless_present = "listen")]
    value: Option<OsString>,
    /// Print each leader's key and value, and each change, until Ctrl-C
    #[arg(long, conflicts_with = "value")]
    listen: bool,
    /// How long leadership stays taken if this program dies without a word
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration::parse)]
    ttl: Duration,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs to its end and returns the exit code.
pub async fn lock(args: LockArgs) -> anyhow::Result<i32> {
    let name = Bytes::copy_from_slice(args.name.as_bytes());
    held(&args.client, args.ttl, async |lease, stop| {
        let taking = retried(&args.client, async |channel| {
            let request = LockRequest { name: name.clone(), lease };
            Ok(LockClient::new(channel).lock(request).await?.into_inner().key)
        });
        let key = tokio::select! {
            key = taking => key?,
            () = stop.cancelled() => return Ok(0),
        };
        let revision = create_revision(&args.client, &key).await?;
        if args.command.is_empty() {
            print(&held_text(args.output, &key, None))?;
            stop.cancelled().await;
            return Ok(0);
        }
        run(&args.command, &key, revision, &stop).await
    })
    .await
}

/// Runs to its end and returns the exit code.
pub async fn elect(args: ElectArgs) -> anyhow::Result<i32> {
    let name = Bytes::copy_from_slice(args.name.as_bytes());
    let Some(value) = &args.value else {
        let mut signals = Signals::new()?;
        return tokio::select! {
            failed = listen(&args.client, &name, args.output) => Err(failed),
            () = signals.next() => Ok(0),
        };
    };
    let value = Bytes::copy_from_slice(value.as_bytes());
    held(&args.client, args.ttl, async |lease, stop| {
        let campaigning = retried(&args.client, async |channel| {
            let request = CampaignRequest { name: name.clone(), lease, value: value.clone() };
            Ok(ElectionClient::new(channel).campaign(request).await?.into_inner().leader.unwrap_or_default())
        });
        let leader = tokio::select! {
            leader = campaigning => leader?,
            () = stop.cancelled() => return Ok(0),
        };
        print(&held_text(args.output, &leader.key, Some(&value)))?;
        stop.cancelled().await;
        Ok(0)
    })
    .await
}

/// What is held, and what is proclaimed with it.
fn held_text(format: Format, key: &[u8], value: Option<&[u8]>) -> Vec<u8> {
    if format == Format::Json {
        return json_line(&json!({ "key": base64(key), "value": value.map(base64) }));
    }
    let mut lines = Lines::new(false);
    lines.key(key);
    value.into_iter().for_each(|value| lines.value(value));
    lines.finish()
}

/// The signals by which a user or a supervisor ends this program.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Does `work` with a lease that is kept alive, and revokes it afterwards. The work is told to stop by a signal, and when the
/// lease is lost.
async fn held(
    client: &ClientArgs,
    ttl: Duration,
    work: impl AsyncFnOnce(i64, CancellationToken) -> anyhow::Result<i32>,
) -> anyhow::Result<i32> {
    let mut signals = Signals::new()?;
    let granting = async {
        let mut leases = LeaseClient::new(client.connect().await?);
        let request = LeaseGrantRequest { ttl: seconds(ttl), id: 0 };
        anyhow::Ok(client.answer(leases.lease_grant(request)).await?.into_inner())
    };
    let granted = tokio::select! {
        granted = granting => granted?,
        () = signals.next() => return Ok(0),
    };
    let (lease, stop) = (granted.id, CancellationToken::new());
    let mut lost = None;
    let outcome = {
        let working = work(lease, stop.clone());
        let keeping = keep(client, lease, Some(granted.ttl), |_| Ok(()));
        let (mut working, mut keeping) = (pin!(working), pin!(keeping));
        loop {
            tokio::select! {
                outcome = &mut working => break outcome,
                error = &mut keeping, if lost.is_none() => {
                    lost = Some(error);
                    stop.cancel();
                }
                () = signals.next() => stop.cancel(),
            }
        }
    };
    if let Some(error) = lost {
        return Err(error.context("the lease is lost, and what it held may be held by another"));
    }
    let release = async {
        let mut leases = LeaseClient::new(client.connect().await?);
        anyhow::Ok(leases.lease_revoke(LeaseRevokeRequest { id: lease }).await?)
    };
    if !matches!(timeout(RELEASE_PATIENCE, release).await, Ok(Ok(_))) && outcome.is_ok() {
        eprintln!("quorate: not released; it is free when the lease ends, in {}s", granted.ttl);
    }
    outcome
}

/// Asks again, another member perhaps, while the answer says that this is worth it. For requests that may wait long.
async fn retried<T>(client: &ClientArgs, mut ask: impl AsyncFnMut(Channel) -> Result<T, Status>) -> anyhow::Result<T> {
    let mut client = client.clone();
    loop {
        let channel = client.connect().await?;
        match ask(channel).await {
            Ok(answer) => return Ok(answer),
            Err(status) if is_transient(&status) => sleep(RETRY_AFTER).await,
            Err(status) => return Err(failure(&status)),
        }
        client.endpoints.rotate_left(1);
    }
}

/// A connection that breaks is `Unknown` or `Cancelled`, by how it broke; the lease says whose place it is.
fn is_transient(status: &Status) -> bool {
    let broken = std::error::Error::source(status).is_some();
    status.code() == Code::Unavailable || broken
}

/// The fencing token of a lock: greater for each holder that comes later.
async fn create_revision(client: &ClientArgs, key: &Bytes) -> anyhow::Result<i64> {
    let range = RangeRequest { key: key.clone(), ..RangeRequest::default() };
    let mut kv = KvClient::new(client.connect().await?);
    let answer = client.answer(kv.range(range)).await?.into_inner();
    let held = answer.kvs.first().context("the lock was lost at once: its lease has ended; give it a longer --ttl")?;
    Ok(held.create_revision())
}

/// Runs the command to its end; told to stop, it passes that on and waits.
async fn run(command: &[OsString], key: &[u8], revision: i64, stop: &CancellationToken) -> anyhow::Result<i32> {
    let [program, args @ ..] = command else { return Err(anyhow!("no command given")) };
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .env("QUORATE_LOCK_KEY", std::ffi::OsStr::from_bytes(key))
        .env("QUORATE_LOCK_REVISION", revision.to_string())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let pid = child.id().and_then(|id| Pid::from_raw(id as i32));
    let ended = tokio::select! {
        ended = child.wait() => ended?,
        () = stop.cancelled() => {
            if let Some(pid) = pid {
                // It may have ended just now.
                let _ = kill_process(pid, Signal::TERM);
            }
            child.wait().await?
        }
    };
    Ok(exit_code(ended))
}

/// As a shell has it: 128 and the signal, if one ended the command.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

async fn listen(client: &ClientArgs, name: &Bytes, format: Format) -> anyhow::Error {
    let mut client = client.clone();
    let mut told: Option<(Vec<u8>, i64)> = None;
    loop {
        let channel = match client.connect().await {
            Ok(channel) => channel,
            Err(error) => return error,
        };
        let observing = ElectionClient::new(channel).observe(LeaderRequest { name: name.clone() }).await;
        let status = match observing {
            Ok(stream) => match show(stream.into_inner(), &mut told, format).await {
                Ok(status) => status,
                Err(error) => return error,
            },
            Err(status) => status,
        };
        if !is_transient(&status) {
            return failure(&status);
        }
        client.endpoints.rotate_left(1);
        sleep(RETRY_AFTER).await;
    }
}

/// Prints what the stream says, but not again what was `told` by an earlier one; returns why it ended.
async fn show(
    mut stream: tonic::Streaming<LeaderResponse>,
    told: &mut Option<(Vec<u8>, i64)>,
    format: Format,
) -> anyhow::Result<Status> {
    while let Some(answer) = stream.next().await {
        let kv = match answer {
            Ok(answer) => answer.kv.unwrap_or_default(),
            Err(status) => return Ok(status),
        };
        let now = Some((kv.key().to_vec(), kv.mod_revision()));
        if *told != now {
            print(&held_text(format, kv.key(), Some(kv.value())))?;
            *told = now;
        }
    }
    Ok(Status::unavailable("the server ended the stream"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_as_a_shell_has_them() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 143);
    }
}
