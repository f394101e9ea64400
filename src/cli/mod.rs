//! The command line: the server's start, and a client for people and scripts.
//!
//! Owns the flags and what is printed. What a command prints goes to standard output and nothing else does; an error is
//! one line that says what to do, and exit code 1. Absent: settings (`config`), which flags only feed.

mod client;
pub mod dev;
mod kv;
mod maintenance;
mod output;
mod settings;
mod snapshot;
mod status;

use std::io::Write;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{Config, MANUAL};
use crate::env::Env;
use crate::telemetry;

pub use client::ClientArgs;
pub use settings::SettingsArgs;

/// A Raft consensus server for Kubernetes that speaks the etcd v3 API, and its client.
#[derive(Debug, Parser)]
#[command(name = "quorate", version, propagate_version = true, infer_subcommands = false)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a member
    Serve(SettingsArgs),
    /// Run a whole cluster on this machine, for trying things out
    Dev(dev::Args),
    /// Show every member: role, term, lag, sizes, and what it waits for
    Status(status::StatusArgs),
    /// Show who belongs to the cluster
    #[command(subcommand)]
    Member(MemberCommand),
    /// Read keys
    Get(kv::GetArgs),
    /// Write a key
    Put(kv::PutArgs),
    /// Delete keys
    Del(kv::DelArgs),
    /// Forget revisions below this one
    Compact(kv::CompactArgs),
    /// Back up, and restore
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Alarms that are on
    #[command(subcommand)]
    Alarm(maintenance::AlarmCommand),
    /// Give disk space back that members' state stores no longer need
    Defrag(maintenance::DefragArgs),
    /// Print the hash of each member's data: equal revisions must have equal hashes
    Hash(maintenance::HashArgs),
    /// Print the settings in force, and where each comes from
    Config(ConfigArgs),
    /// Print a completion script
    Completion {
        /// Which shell's
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// One line a member
    List(status::MemberListArgs),
}

#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// Print the commented default file instead, which is also the manual
    #[arg(long)]
    manual: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Runs the command on a runtime that suits it.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => serve(&args),
        Command::Dev(args) => runtime(0)?.block_on(dev::run(args)),
        Command::Config(args) => {
            let text = if args.manual { MANUAL.to_owned() } else { args.settings.load(&Env::real())?.describe() };
            print(text.as_bytes())
        }
        Command::Completion { shell } => print(&completion(shell)),
        Command::Status(args) => request(status::status(args)),
        Command::Member(MemberCommand::List(args)) => request(status::member_list(args)),
        Command::Get(args) => request(kv::get(args)),
        Command::Put(args) => request(kv::put(args)),
        Command::Del(args) => request(kv::del(args)),
        Command::Compact(args) => request(kv::compact(args)),
        Command::Snapshot(command) => request(snapshot::run(command)),
        Command::Alarm(command) => request(maintenance::alarm(command)),
        Command::Defrag(args) => request(maintenance::defrag(args)),
        Command::Hash(args) => request(maintenance::hash(args)),
    }
}

/// Set by `dev` in the environment of its pods: they end when it does, however it ends.
const DIE_WITH_PARENT: &str = "QUORATE_DIE_WITH_PARENT";

fn serve(args: &SettingsArgs) -> anyhow::Result<()> {
    if std::env::var_os(DIE_WITH_PARENT).is_some() {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    }
    let config: Config = args.load(&Env::real())?.config;
    telemetry::init(&config.telemetry)?;
    runtime(config.server.worker_threads)?.block_on(crate::server::run(config))
}

/// An event loop; 0 threads: one a core.
fn runtime(worker_threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if worker_threads > 0 {
        builder.worker_threads(worker_threads);
    }
    builder.enable_all().thread_name("quorate").build().context("cannot start the event loop's threads")
}

/// Runs one client command, and prints what it gives.
fn request(command: impl Future<Output = anyhow::Result<Vec<u8>>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    print(&runtime.block_on(command)?)
}

fn completion(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "quorate", &mut script);
    script
}

/// Writes to standard output. A reader that has seen enough (`quorate get ... | head -1`) is no error.
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_parses() {
        let lines = [
            "serve --name kv-0 --slot 0 --data-dir /d --peers kv-%d:2380 --size 3 --set raft.lease_reads=true",
            "serve --config /c --listen-client 0.0.0.0:1 --listen-peer 0.0.0.0:2 --log-level debug --log-format json",
            "serve --advertise-client http://a:1,http://b:2 --advertise-peer a:3",
            "dev --replicas 5 --data-dir /d --kill-one-every 30s",
            "status --endpoints a:1,b:2 -o json",
            "member list --timeout 3s",
            "get k --prefix --limit 1 --rev 2 --serializable --keys-only -o json",
            "get a z --count-only",
            "get k --print-value-only --dial-timeout 1s",
            "get --from-key k",
            "put k v --prev-kv",
            "put k",
            "put k -- --value",
            "del k --prefix --prev-kv",
            "compact 7 --physical",
            "config --set raft.lease_reads=true",
            "config --manual",
            "completion bash",
        ];
        for line in lines {
            let words = std::iter::once("quorate").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let lines = [
            "",
            "get",
            "get a z --prefix",
            "get a --prefix --from-key",
            "get a --keys-only --count-only",
            "get a --keys-only --print-value-only",
            "get a -o yaml",
            "put k v w",
            "compact x",
            "status --timeout 3",
            "completion tcsh",
            "serve --slot 70000",
        ];
        for line in lines {
            let words = std::iter::once("quorate").chain(line.split(' ').filter(|word| !word.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn completion_works_for_every_shell() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            let script = String::from_utf8(completion(*shell)).unwrap();
            assert!(script.contains("quorate") && script.contains("member"), "{shell}");
        }
    }
}
