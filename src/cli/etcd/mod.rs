//! `quorate etcd`: a member that is started with etcd's command line, and the same under a link named `etcd`.
//!
//! One of three sources says all, in etcd's order: the file, or else flags and `ETCD_*` variables. What they come to are settings like
//! any other (`translate`), over `QUORATE_*` variables; the server is started as `serve` starts it. Absent: a rule of its own.

mod discovery;
mod environment;
mod file;
mod flags;
mod translate;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use anyhow::Context as _;

use self::discovery::{Dns, discover};
use self::flags::{Line, Pairs};
use self::translate::{Given, Members, Output};
use crate::api::{ETCD_VERSION, VERSION};
use crate::config::{self, File, Sources};
use crate::env::{Env, net, process, srv};
use crate::identity::read_small;
use crate::storage::member_dir::MemberDir;

/// The name under which a link to this program is an etcd.
pub const NAME: &str = "etcd";

/// Whether this program was called by that name.
pub fn is_called(program: Option<&OsString>) -> bool {
    program.is_some_and(|program| Path::new(program).file_name().is_some_and(|name| name == NAME))
}

/// Runs a member, or prints what was asked for.
pub fn run(args: &[OsString]) -> anyhow::Result<()> {
    let text =
        |word: &OsString| word.clone().into_string().map_err(|word| anyhow::anyhow!("{word:?} is not valid UTF-8"));
    let args: Vec<String> = args.iter().map(text).collect::<Result<_, _>>()?;
    let flags = match flags::read(&args)? {
        Line::Version => return super::print(version().as_bytes()),
        Line::Help => return super::print(flags::help().as_bytes()),
        Line::Flags(flags) => flags,
    };
    let env = super::settings::environment();
    let mut notes = Vec::new();
    let given = gather(flags, &env, &mut notes)?;
    // What cannot be read may belong to a cluster: that is for the server to say.
    let known = MemberDir::peek(Env::real().disk, Path::new(&given.data_dir()));
    let is_formed = known.map_or(true, |known| known.is_some_and(|known| known.cluster_id != 0));
    let members = discover(&given, is_formed, &Dns { services: &srv::look_up, addresses: &net::addresses })?;
    match &members {
        Members::Listed => {}
        Members::Known => {
            notes.push(
                "--discovery-srv changes nothing: this disk belongs to a cluster, which knows its members".into(),
            );
        }
        Members::Found(found) => notes.push(format!("--discovery-srv: the members in DNS are {}", found.list)),
    }
    let translation = translate::translate(&given, &members)?;
    notes.extend(translation.notes);
    match &translation.output {
        Output::Error => {}
        Output::Standard => process::join_error_to_output().context("--log-outputs stdout")?,
        Output::File(path) => {
            process::join_error_to_file(Path::new(path)).with_context(|| format!("--log-outputs {path}"))?
        }
    }
    let sources = Sources { file: File::None, env, flags: translation.settings };
    let config = config::load(Env::real().disk.as_ref(), &sources)?.config;
    super::start(config, &notes)
}

/// The flags in force, wherever they were given.
fn gather(mut flags: Pairs, env: &BTreeMap<String, String>, notes: &mut Vec<String>) -> anyhow::Result<Given> {
    const FILE: &str = "config-file";
    let named = flags.iter().rev().find(|(name, _)| *name == FILE).map(|(_, path)| path.clone());
    let path = named.or_else(|| env.get("ETCD_CONFIG_FILE").cloned()).filter(|path| !path.is_empty());
    if let Some(path) = path {
        notes.push(format!("settings are those of {path}: flags and ETCD_* variables are ignored, as by etcd"));
        let bytes =
            read_small(Env::real().disk.as_ref(), Path::new(&path)).with_context(|| format!("cannot read {path}"))?;
        let text = String::from_utf8(bytes).with_context(|| format!("{path} is not valid UTF-8"))?;
        return Ok(Given::new(file::read(&text).with_context(|| path)?));
    }
    let (variables, unknown) = environment::read(env, &flags)?;
    notes.extend(
        unknown.iter().map(|name| format!("the variable {name} stands for no flag of etcd, and changes nothing")),
    );
    flags.extend(variables);
    Ok(Given::new(flags))
}

/// As etcd prints it; what is not so is said where it would be.
fn version() -> String {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let arch = match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: none (quorate {VERSION}, which speaks etcd's API)\n\
         Go Version: none (written in Rust)\nGo OS/Arch: {os}/{arch}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_known_by_its_name() {
        for (program, expected) in [("etcd", true), ("/usr/bin/etcd", true), ("quorate", false), ("etcdctl", false)] {
            assert_eq!(is_called(Some(&program.into())), expected, "{program}");
        }
        assert!(!is_called(None));
    }

    #[test]
    fn version_is_told_in_etcds_four_lines() {
        let heads = version().lines().map(|line| line.split_once(": ").unwrap().0.to_owned()).collect::<Vec<_>>();
        assert_eq!(heads, ["etcd Version", "Git SHA", "Go Version", "Go OS/Arch"]);
    }
}
