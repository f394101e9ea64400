//! The command line: the server's start, and a client for people and scripts.
//!
//! Owns the flags and what is printed. What a command prints goes to standard output and nothing else does; an error is
//! one line that says what to do, and exit code 1. Absent: settings (`config`), which flags only feed.

mod auth;
mod backup;
mod bench;
mod cert;
mod client;
mod credentials;
pub mod dev;
mod diagnose;
pub mod etcd;
mod examples;
mod get;
mod health;
mod inspect;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod man;
mod member;
mod members;
mod migrate;
mod new_cluster;
mod output;
mod progress;
mod promote;
mod recover;
mod settings;
mod snapshot;
mod status;
mod top;
mod txn;
mod watch;

use std::io::Write;

use anyhow::{Context, bail};
use clap::{CommandFactory, FromArgMatches as _, Parser, Subcommand};

use crate::config::{Config, MANUAL, cgroup_memory_limit};
use crate::env::{Env, threads};
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
    /// Run a member with etcd's own flags, ETCD_* variables or file: `quorate etcd --help` lists them
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Etcd {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Run a whole cluster on this machine, for trying things out
    Dev(dev::Args),
    /// Show every member (role, term, lag, sizes), and what is the matter and what to do; exit code 2 for errors
    Status(status::StatusArgs),
    /// Write one tar file with what whoever helps needs: settings without secrets, status, conditions, metrics, last log lines
    Diagnose(diagnose::DiagnoseArgs),
    /// Show and change who belongs to the cluster
    #[command(subcommand)]
    Member(MemberCommand),
    /// Form a new cluster from a survivor's disk, when a quorum is lost for good
    Recover(recover::RecoverArgs),
    /// A table of all members that is drawn anew, with how much each does
    Top(top::TopArgs),
    /// Ask every member whether it serves; the exit code is the verdict
    Health(health::HealthArgs),
    /// Read keys
    Get(get::GetArgs),
    /// Write a key
    Put(kv::PutArgs),
    /// Delete keys
    Del(kv::DelArgs),
    /// Compare, and then write, read and delete, all at one revision
    Txn(txn::TxnArgs),
    /// Print changes as they happen
    Watch(watch::WatchArgs),
    /// Forget revisions below this one
    Compact(kv::CompactArgs),
    /// Back up, and restore
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Backups at a path, made by a cluster itself or by `backup now`: list, check and restore them
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// Make a standby the cluster that clients write to, in the place of the one that it follows
    Promote(promote::PromoteArgs),
    /// Copy a live etcd into this cluster, and follow it until you switch
    Migrate(migrate::MigrateArgs),
    /// Keep the keys of one prefix the same as those of another, here or in another cluster
    Mirror(migrate::mirror::MirrorArgs),
    /// Alarms that are on
    #[command(subcommand)]
    Alarm(maintenance::AlarmCommand),
    /// Give disk space back that members' state stores no longer need
    Defrag(maintenance::DefragArgs),
    /// Compare the members' data by its hash; the exit code is the verdict
    Hash(health::HashArgs),
    /// Have another member lead
    MoveLeader(maintenance::MoveLeaderArgs),
    /// Measure how the cluster does under a load
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Check what the cluster is good for
    #[command(subcommand)]
    Check(bench::CheckCommand),
    /// What the files of a member hold
    #[command(subcommand)]
    Log(inspect::LogCommand),
    /// Leases: keys that are put with one go when it ends
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// Users: who may ask
    #[command(subcommand)]
    User(auth::UserCommand),
    /// Roles: what users may do
    #[command(subcommand)]
    Role(auth::RoleCommand),
    /// Whether users and roles count
    #[command(subcommand)]
    Auth(auth::AuthCommand),
    /// Hold a lock while a command runs
    Lock(lock::LockArgs),
    /// Stand for election, or follow who is elected
    Elect(lock::ElectArgs),
    /// Make certificates, and say what is in one
    #[command(subcommand)]
    Cert(cert::CertCommand),
    /// Print the settings in force, and where each comes from
    Config(ConfigArgs),
    /// Print the versions of this program, and of the API that it speaks
    Version(VersionArgs),
    /// Print a completion script
    Completion {
        /// Which shell's
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man(man::ManArgs),
}

#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// One line a member
    List(status::MemberListArgs),
    /// Add a node that runs with an empty disk; it votes when it has caught up
    Add(member::AddArgs),
    /// Remove a member for good; the leader hands over first
    Remove(member::WhichArgs),
    /// Tell the others a member's new peer address
    Update(member::UpdateArgs),
    /// Let a learner vote that was added with --learner
    Promote(member::WhichArgs),
    /// Say how many members there should be, outside of Kubernetes; those of higher slots are removed
    Scale(member::ScaleArgs),
    /// What the leader sees, wants and does about the membership, and what keeps it from more
    Why(member::WhyArgs),
}

#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// Print the commented default file instead, which is also the manual
    #[arg(long, conflicts_with = "output")]
    manual: bool,
    #[arg(short, long, value_enum, default_value_t = output::Format::Simple)]
    output: output::Format,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Debug, clap::Args)]
pub struct VersionArgs {
    #[arg(short, long, value_enum, default_value_t = output::Format::Simple)]
    output: output::Format,
}

/// The command line of this process; one that is wrong, or asks for help, ends it.
pub fn parse() -> Cli {
    let mut command = command();
    let cli = Cli::from_arg_matches(&command.get_matches_mut());
    cli.unwrap_or_else(|error| error.format(&mut command).exit())
}

/// The command line with what derives from all of it: examples, and etcdctl's name for the form of what is printed.
pub fn command() -> clap::Command {
    examples::add(with_write_out(Cli::command()))
}

fn with_write_out(mut command: clap::Command) -> clap::Command {
    if command.get_arguments().any(|arg| arg.get_id() == "output") {
        let named = |arg: clap::Arg| arg.visible_short_alias('w').visible_alias("write-out");
        command = command.mut_arg("output", |arg| named(arg).help("How it is printed"));
    }
    command.mut_subcommands(with_write_out)
}

/// An error and its causes as one line. A cause that its error has said already is not said twice.
pub fn said(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}

/// Runs the command on a runtime that suits it.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    // Not for every command: `lock` hands its umask on to the program that it starts.
    if let Command::Serve(_)
    | Command::Etcd { .. }
    | Command::Dev(_)
    | Command::Recover(_)
    | Command::Snapshot(_)
    | Command::Backup(_)
    | Command::Diagnose(_)
    | Command::Cert(_) = cli.command
    {
        crate::env::process::keep_files_private();
    }
    match cli.command {
        Command::Serve(args) => {
            let loaded = args.load(&Env::real())?;
            start(loaded.config, &loaded.mistakes)
        }
        Command::Etcd { args } => etcd::run(&args),
        Command::Dev(args) => runtime(0)?.block_on(dev::run(args)),
        Command::Config(args) => config(&args),
        Command::Version(args) => print(&version(args.output)),
        Command::Cert(command) => print(&cert::run(command)?),
        Command::Completion { shell } => print(&completion(shell)),
        Command::Man(args) => man::run(&args),
        Command::Status(args) => {
            let (text, code) = client_runtime()?.block_on(status::status(args))?;
            print(&text)?;
            exit(code)
        }
        Command::Diagnose(args) => request(diagnose::diagnose(args)),
        Command::Member(command) => member(command),
        Command::Recover(args) => {
            telemetry::init(&crate::config::Telemetry { level: "warn".into(), ..Default::default() })?;
            print(&runtime(1)?.block_on(recover::recover(args))?)
        }
        Command::Top(args) => client_runtime()?.block_on(top::top(args)),
        Command::Health(args) => client_runtime()?.block_on(health::health(args)),
        Command::Get(args) => request(get::get(args)),
        Command::Txn(args) => request(txn::txn(args)),
        Command::Put(args) => request(kv::put(args)),
        Command::Del(args) => request(kv::del(args)),
        Command::Compact(args) => request(kv::compact(args)),
        Command::Snapshot(command) => request(snapshot::run(command)),
        Command::Backup(command) => request(backup::run(command)),
        Command::Promote(args) => request(promote::promote(args)),
        Command::Migrate(args) => request(migrate::migrate(args)),
        Command::Mirror(args) => request(migrate::mirror::mirror(args)),
        Command::Alarm(command) => request(maintenance::alarm(command)),
        Command::Defrag(args) => client_runtime()?.block_on(maintenance::defrag(args)),
        Command::Hash(args) => client_runtime()?.block_on(health::hash(args)),
        Command::MoveLeader(args) => request(maintenance::move_leader(args)),
        Command::Bench(command) => client_runtime()?.block_on(bench::bench(command)),
        Command::Check(command) => client_runtime()?.block_on(bench::check(command)),
        Command::Log(command) => print(&inspect::run(command)?),
        Command::User(command) => request(auth::user(command)),
        Command::Role(command) => request(auth::role(command)),
        Command::Auth(command) => request(auth::auth(command)),
        Command::Lease(command) => client_runtime()?.block_on(lease::run(command)),
        Command::Lock(args) => exit(client_runtime()?.block_on(lock::lock(args))?),
        Command::Elect(args) => exit(client_runtime()?.block_on(lock::elect(args))?),
        Command::Watch(args) => client_runtime()?.block_on(watch::watch(args)),
    }
}

fn member(command: MemberCommand) -> anyhow::Result<()> {
    match command {
        MemberCommand::List(args) => request(status::member_list(args)),
        MemberCommand::Add(args) => request(member::add(args)),
        MemberCommand::Remove(args) => request(member::remove(args)),
        MemberCommand::Update(args) => request(member::update(args)),
        MemberCommand::Promote(args) => request(member::promote(args)),
        MemberCommand::Scale(args) => request(member::scale(args)),
        MemberCommand::Why(args) => request(member::why(args)),
    }
}

/// Set by `dev` in the environment of its pods: they end when it does, however it ends.
const DIE_WITH_PARENT: &str = "QUORATE_DIE_WITH_PARENT";

/// Runs a member; `notes` are lines for its log.
fn start(config: Config, notes: &[String]) -> anyhow::Result<()> {
    if cgroup_memory_limit(&*Env::real().disk).is_some() {
        crate::env::process::give_memory_back_soon();
    }
    if std::env::var_os(DIE_WITH_PARENT).is_some() {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    }
    let log = telemetry::Background::init(&config.telemetry)?;
    for note in notes {
        tracing::warn!("{note}");
    }
    let ended = runtime(config.server.worker_threads)?.block_on(crate::server::run(config));
    let Err(error) = ended else { return Ok(()) };
    // As `main` says it, but whoever reads it may be stuck.
    log.last(&format!("quorate: {}", said(&error)));
    drop(log);
    exit(1)
}

fn runtime(worker_threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    threads::event_loop(worker_threads).context("cannot start the event loop's threads")
}

/// Runs one client command, and prints what it gives.
fn request(command: impl Future<Output = anyhow::Result<Vec<u8>>>) -> anyhow::Result<()> {
    print(&client_runtime()?.block_on(command)?)
}

fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Ends with the exit code of a command that was run; 0 goes the usual way.
fn exit(code: i32) -> anyhow::Result<()> {
    if code != 0 {
        std::process::exit(code);
    }
    Ok(())
}

fn completion(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "quorate", &mut script);
    script
}

fn config(args: &ConfigArgs) -> anyhow::Result<()> {
    if args.manual {
        return print(MANUAL.as_bytes());
    }
    let loaded = args.settings.load(&Env::real())?;
    loaded.mistakes.iter().for_each(|mistake| eprintln!("quorate: {mistake}"));
    match args.output {
        output::Format::Simple => print(loaded.describe().as_bytes()),
        output::Format::Json => print(&output::json_line(&loaded.json())),
    }
}

fn version(format: output::Format) -> Vec<u8> {
    let (own, api) = (env!("CARGO_PKG_VERSION"), crate::api::ETCD_VERSION);
    match format {
        output::Format::Simple => format!("quorate version: {own}\netcd API version: {api}\n").into_bytes(),
        output::Format::Json => output::json_line(&serde_json::json!({ "quorate": own, "etcd_api": api })),
    }
}

/// Prints what was found, and ends with an error if there is a fault in it.
fn verdict(found: &[u8], fault: Option<String>) -> anyhow::Result<()> {
    print(found)?;
    match fault {
        None => Ok(()),
        Some(fault) => bail!("{fault}"),
    }
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

    const LINES: &[&str] = &[
        "serve --name kv-0 --slot 0 --data-dir /d --peers kv-%d:2380 --size 3 --set raft.lease_reads=true",
        "serve --config /c --listen-client 0.0.0.0:1 --listen-peer 0.0.0.0:2 --log-level debug --log-format json",
        "serve --advertise-client http://a:1,http://b:2 --advertise-peer a:3",
        "dev --tls",
        "cert ca --dir d --name ours --life 87600h",
        "cert server kv-0,10.0.0.1 --peer --out kv --ca c --ca-key k --life 90days",
        "cert client alice -o json",
        "cert show a.crt -o json",
        "dev --replicas 5 --data-dir /d --kill-one-every 30s",
        "status --endpoints a:1,b:2 -o json",
        "diagnose --endpoints a:1 --out d.tar",
        "member list --timeout 3s",
        "recover --data-dir /d --dry-run",
        "member add kv-3.kv:2380 --learner -o json",
        "member remove a0001",
        "member update 0xa0001 http://kv-3:2380",
        "member promote a0001",
        "member scale 5 --start 1",
        "member scale --unset",
        "member why -o json",
        "serve --reader --join a:1,b:2",
        "etcd",
        "etcd --name a --version --help -data-dir=/d x",
        "serve --by-hand --peers kv-%d:2380",
        "get k --prefix --limit 1 --rev 2 --serializable --keys-only -o json",
        "get a z --count-only",
        "get a --cacert ca.crt --cert me.crt --key me.key --endpoints https://a:1",
        "migrate --from https://a:1 --from-cacert ca --from-cert c --from-key k --cacert ca2",
        "get k --print-value-only --dial-timeout 1s",
        "get --from-key k",
        "put k v --prev-kv",
        "put k",
        "put k -- --value",
        "del k --prefix --prev-kv",
        "compact 7 --physical",
        "put k v --lease 1f",
        "lease grant 60s --id ff -o json",
        "lease keep-alive 694d71ddacfda227 --once",
        "lease revoke 1f",
        "lease list",
        "lease ttl 1f --keys",
        "user add u --no-password",
        "user add u --new-user-password x --user root:secret",
        "user passwd u --new-user-password-file f --user root --password-file g",
        "user grant-role u r --token t",
        "user revoke-role u r",
        "user get u -o json",
        "user list",
        "user delete u -o json",
        "role add r",
        "role grant-permission r readwrite k --prefix",
        "role revoke-permission r a b",
        "role get r",
        "role list",
        "role delete r",
        "auth enable --user root --password p -w json",
        "auth disable",
        "auth status -o json",
        "lock name",
        "lock name --ttl 5s -- sh -c true",
        "elect name value",
        "elect --listen name",
        "watch k --prefix --rev 2 --prev-kv --progress-notify -o json",
        "watch a z",
        "watch k -- sh -c true",
        "config --set raft.lease_reads=true",
        "config --manual",
        "snapshot save backup.db --endpoints a:1",
        "snapshot status backup.db -o json",
        "snapshot restore backup.db --data-dir d --name kv-%d --peers kv-%d.kv:2380 --size 3 --bump-revision 9",
        "snapshot restore backup.db --data-dir d --peers kv-%d.kv:2380 --size 3 --slot 2 --token x",
        "backup now s3://b/p --store-endpoint http://s:9000 --key-file k --endpoints a:1",
        "backup list /d -o json",
        "backup status /d",
        "backup verify /d --newest -o json",
        "backup prune /d --keep-fulls 3 --keep-age 30days --dry-run",
        "backup restore /d --data-dir x --at 2026-11-29T10:15:00Z --peers kv-%d:2380 --name kv-%d --size 3",
        "backup restore /d --data-dir x --revision 7 --generation 2 --same-revisions",
        "backup adopt /d --endpoints a:1",
        "snapshot status etcd.db --skip-hash-check",
        "snapshot restore etcd.db --data-dir d --skip-hash-check --hold-leases 10m",
        "migrate --from a:1 --to c:1 --same-revisions",
        "migrate --from a:1,b:1 --to c:1 --until-synced",
        "migrate --from a:1 --with-users --from-user root:p --user root --password p",
        "alarm list",
        "alarm disarm",
        "defrag --endpoints a:1,b:1",
        "hash --rev 7 -o json",
        "hash --only-endpoints --write-out table",
        "health -w json --serializable",
        "defrag --only-endpoints -o json",
        "move-leader",
        "move-leader kv-1",
        "member remove kv-0",
        "member promote kv-0 -w json",
        "get k --prefix --sort-by modify --order descend --limit 3 --hex -w table",
        "get k -w fields",
        "put k --ignore-value --lease 1f",
        "put k v --ignore-lease",
        "put k v --if-rev 7",
        "put k v --if-absent -w json",
        "txn",
        "txn - -o json",
        "txn file.txt",
        "lease grant 60",
        "bench put --clients 10 --connections 2 --duration 5s --rate 100",
        "bench get --total 1000 --serializable",
        "check perf --load m --duration 10s -o json",
        "mirror --from a:1 --to b:1 --prefix a/ --to-prefix b/ --until-synced",
        "top --interval 1s --count 3",
        "log inspect /var/lib/quorate --entries 10 -o json",
        "version -o json",
        "config -o json",
        "completion bash",
        "man pages",
    ];

    #[test]
    fn command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_parses() {
        for line in LINES {
            let words = std::iter::once("quorate").chain(line.split(' '));
            assert!(command().try_get_matches_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn every_command_that_answers_does_so_in_json_too() {
        fn without(command: &clap::Command, path: &str, found: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
            let has_output = command.get_arguments().any(|arg| arg.get_id() == "output");
            if command.get_subcommands().next().is_none() && !has_output {
                found.push(path.trim_start_matches("quorate ").to_owned());
            }
            command.get_subcommands().for_each(|inner| without(inner, &path, found));
        }
        let mut found = Vec::new();
        without(&command(), "", &mut found);
        found.sort();
        assert_eq!(found, ["completion", "dev", "etcd", "man", "serve"], "they run members or make files");
    }

    #[test]
    fn contradictions_are_refused() {
        let lines = [
            "",
            "get",
            "get a z --prefix",
            "get a --prefix --from-key",
            "get a --cert me.crt",
            "get a --key me.key",
            "get a --keys-only --count-only",
            "get a --keys-only --print-value-only",
            "get a -o yaml",
            "put k v w",
            "compact x",
            "put k v --if-rev 7 --if-absent",
            "put k v --ignore-value",
            "put k v --if-rev 0",
            "put k v --ignore-lease --lease 1f",
            "lease grant 60x",
            "user add u --no-password --new-user-password x",
            "role grant-permission r all k",
            "user grant-role u",
            "lease ttl 0",
            "lock",
            "elect name",
            "elect --listen name value",
            "watch",
            "watch a z --prefix",
            "watch a --rev x",
            "status --timeout 3",
            "completion tcsh",
            "serve --slot 70000",
            "snapshot restore f --data-dir d --slot 1",
            "backup restore /d --data-dir x --at yesterday",
            "backup restore /d --data-dir x --at latest --revision 7",
            "backup list",
            "migrate",
            "migrate --from a:1 --same-revisions --prefix k",
            "migrate --from a:1 --same-revisions --with-users",
            "serve --reader --by-hand",
            "member scale 0",
            "member scale",
            "member scale 3 --unset",
            "get a --sort-by size",
            "bench put --total 5 --duration 5s",
        ];
        for line in lines {
            let words = std::iter::once("quorate").chain(line.split(' ').filter(|word| !word.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn a_cause_is_said_once_and_on_one_line() {
        let cause = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let twice = anyhow::Error::new(cause()).context(format!("/file: {}", cause())).context("cannot\nread");
        assert_eq!(said(&twice), format!("cannot read: /file: {}", cause()));
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
