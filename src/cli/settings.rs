//! Flags that are settings.
//!
//! Each stands for one `section.key`; `--set` reaches all others. Invariant: a flag only feeds [`config::load`], which
//! checks it as it checks every other source.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::config::{self, Error, File, Flag, Loaded, Sources};
use crate::env::Env;

/// Settings on the command line, over those of the environment and the file.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SettingsArgs {
    /// Settings file [default: /etc/quorate/quorate.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// This node's name [default: POD_NAME, else the host name]
    #[arg(long)]
    pub name: Option<String>,
    /// This node's slot [default: the digits after the last '-' of the name]
    #[arg(long)]
    pub slot: Option<u16>,
    /// Where all state lives
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// Address of every slot, as in kv-%d.kv-headless:2380 [default: none, a cluster of one]
    #[arg(long, value_name = "PATTERN")]
    pub peers: Option<String>,
    /// Members that the first formation waits for
    #[arg(long)]
    pub size: Option<u16>,
    /// Join as a reader: never vote, forward writes, and be removed when this ends
    #[arg(long, conflicts_with = "by_hand")]
    pub reader: bool,
    /// Wait to be added by `quorate member add`, then vote
    #[arg(long)]
    pub by_hand: bool,
    /// Peer addresses of members to join, with commas, beside those of --peers
    #[arg(long, value_name = "HOST:PORT")]
    pub join: Option<String>,
    /// Where clients connect: one place or more, with commas; unix:PATH for a socket in the file system
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen_client: Option<String>,
    /// Where members connect: one place or more, with commas
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen_peer: Option<String>,
    /// Where probes, metrics and `status` ask, or `off`; without it, beside the clients' port, two above
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen_status: Option<String>,
    /// URLs that clients are told, with commas
    #[arg(long, value_name = "URLS")]
    pub advertise_client: Option<String>,
    /// Address that members are told; several with commas
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_peer: Option<String>,
    /// Begin a new cluster with a backup: a path as of `quorate backup`, with @latest, @TIME or @REVISION after it. A cluster that there is
    /// already is not touched
    #[arg(long, value_name = "URL[@WHEN]")]
    pub restore_from: Option<String>,
    /// Begin a new cluster as the standby of another one, whose backups are at this path: it takes no writes until `quorate promote`. A cluster
    /// that there is already is not touched
    #[arg(long, value_name = "URL", conflicts_with = "restore_from")]
    pub follow: Option<String>,
    /// A level, or levels by module: info,quorate::raft=debug
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Any setting (`quorate config` lists them); may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

/// This process's variables; those that are no text stand for nothing here.
pub(super) fn environment() -> BTreeMap<String, String> {
    let text = |word: std::ffi::OsString| word.into_string().ok();
    std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect()
}

impl SettingsArgs {
    /// Reads all sources: the file through `env`, and this process's environment.
    pub fn load(&self, env: &Env) -> Result<Loaded, Error> {
        let file = self.config.clone().map_or(File::Default, File::Named);
        let sources = Sources { file, env: environment(), flags: self.flags()? };
        config::load(env.disk.as_ref(), &sources)
    }

    /// The flags as settings. `--set` comes first, so that a named flag is not overridden by accident.
    fn flags(&self) -> Result<Vec<Flag>, Error> {
        let (slot, size) = (self.slot.map(|slot| slot.to_string()), self.size.map(|size| size.to_string()));
        let kind = match (self.reader, self.by_hand) {
            (true, _) => Some(("--reader", "reader".to_owned())),
            (_, true) => Some(("--by-hand", "manual".to_owned())),
            _ => None,
        };
        let named = [
            ("identity.name", "--name", &self.name),
            ("identity.slot", "--slot", &slot),
            ("server.data_dir", "--data-dir", &self.data_dir),
            ("cluster.peers", "--peers", &self.peers),
            ("cluster.size", "--size", &size),
            ("cluster.join", "--join", &self.join),
            ("server.listen_client", "--listen-client", &self.listen_client),
            ("server.listen_peer", "--listen-peer", &self.listen_peer),
            ("server.listen_status", "--listen-status", &self.listen_status),
            ("server.advertise_client", "--advertise-client", &self.advertise_client),
            ("server.advertise_peer", "--advertise-peer", &self.advertise_peer),
            ("restore.from", "--restore-from", &self.restore_from),
            ("restore.follow", "--follow", &self.follow),
            ("telemetry.level", "--log-level", &self.log_level),
            ("telemetry.format", "--log-format", &self.log_format),
        ];
        let mut flags: Vec<Flag> = Vec::new();
        for text in &self.set {
            let fault = || Error::Flag { flag: "--set".to_owned(), text: text.clone() };
            let (key, value) = text.split_once('=').ok_or_else(fault)?;
            if !key.contains('.') {
                return Err(fault());
            }
            flags.push(Flag { key: key.trim().to_owned(), value: value.trim().to_owned(), flag: "--set".to_owned() });
        }
        if let Some((flag, value)) = kind {
            flags.push(Flag { key: "cluster.kind".to_owned(), value, flag: flag.to_owned() });
        }
        for (key, flag, value) in named {
            if let Some(value) = value {
                flags.push(Flag { key: key.to_owned(), value: value.clone(), flag: flag.to_owned() });
            }
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: SettingsArgs,
    }

    fn flags(line: &str) -> Result<Vec<Flag>, Error> {
        Line::try_parse_from(line.split(' ')).unwrap().settings.flags()
    }

    #[test]
    fn every_named_flag_reaches_its_key() {
        let line = "x --name kv-4 --slot 1 --data-dir /d --peers kv-%d:2380 --size 3 --listen-client 127.0.0.1:1 \
                    --listen-peer 127.0.0.1:2 --listen-status 127.0.0.1:9 --advertise-client http://a:1 --advertise-peer a:2 --log-level debug \
                    --log-format json --restore-from /b@latest --set raft.lease_reads=true";
        let words = line.split_whitespace().collect::<Vec<_>>().join(" ");
        let sources = Sources { flags: flags(&words).unwrap(), ..Sources::default() };
        let loaded = config::load(&crate::config::tests::Files::default(), &sources).unwrap();
        let config = &loaded.config;
        assert_eq!((config.identity.name.as_str(), config.identity.slot), ("kv-4", Some(1)));
        assert_eq!((config.cluster.peers.as_str(), config.cluster.size), ("kv-%d:2380", 3));
        let server = &config.server;
        let listen = [server.listen_client.places(), server.listen_peer.places(), &server.status_places()].concat();
        assert_eq!(
            listen.iter().map(|p| p.to_string()).collect::<Vec<_>>(),
            ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:9"]
        );
        assert_eq!(
            (config.server.advertise_client[0].as_str(), config.server.advertise_peer[0].as_str()),
            ("http://a:1", "a:2")
        );
        assert_eq!((config.telemetry.level.as_str(), config.telemetry.format), ("debug", config::LogFormat::Json));
        assert_eq!(config.restore.from, "/b@latest");
        assert!(config.raft.lease_reads && config.server.data_dir.ends_with("d"));
        assert_eq!((loaded.origins.len(), loaded.origins["cluster.size"].as_str()), (14, "--size"));
    }

    #[test]
    fn a_standby_begins_with_no_moment() {
        let sources = Sources { flags: flags("x --follow s3://b/kv").unwrap(), ..Sources::default() };
        let loaded = config::load(&crate::config::tests::Files::default(), &sources).unwrap();
        assert_eq!(loaded.config.restore.follow, "s3://b/kv");
        assert!(Line::try_parse_from(["x", "--follow", "/b", "--restore-from", "/b"]).is_err());
    }

    #[test]
    fn named_flag_wins_over_set() {
        let sources =
            Sources { flags: flags("x --log-level warn --set telemetry.level=debug").unwrap(), ..Sources::default() };
        let loaded = config::load(&crate::config::tests::Files::default(), &sources).unwrap();
        assert_eq!(loaded.config.telemetry.level, "warn");
    }

    #[test]
    fn set_without_key_or_value_is_refused() {
        for text in ["raft.lease_reads", "lease_reads=true", "=x"] {
            let message = flags(&format!("x --set {text}")).unwrap_err().to_string();
            assert!(message.contains(text) && message.contains("expected section.key=value"), "{message}");
        }
    }
}
