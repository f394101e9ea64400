//! `cert`: makes certificates, for machines without anything that does, and says what is in one.
//!
//! Files that exist are never written over: a CA that was replaced by accident would part a cluster from its clients. Keys are for
//! their owner alone. Absent: renewal; a leaf is made anew, and servers take it from its files while they run.

use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use serde_json::json;

use super::output::{Format, done, json_line, table};
use crate::config::units::duration;
use crate::env::{Env, OpenMode};
use crate::identity::read_bounded;
use crate::secure::mint::{self, Issuer, Made, Subject, Use};
use crate::secure::{Description, describe, slot_uri};

/// Largest file that is read.
const FILE_BYTES_MAX: usize = 4 << 20;

#[derive(Debug, clap::Subcommand)]
pub enum CertCommand {
    /// Make a CA: ca.crt, which all who connect trust, and ca.key, which signs
    Ca(CaArgs),
    /// Make a server's certificate and key for the names and addresses at which it is reached
    Server(ServerArgs),
    /// Make a client's certificate and key; its name is the user, where users are
    Client(LeafArgs),
    /// Say what is in a file of certificates
    Show(ShowArgs),
}

#[derive(Debug, clap::Args)]
pub struct CaArgs {
    /// Where to put the files
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Its name; one CA for members and another for clients keeps them apart
    #[arg(long, default_value = "quorate CA")]
    name: String,
    /// How long it is valid
    #[arg(long, value_name = "DURATION", default_value = "87600h", value_parser = duration::parse)]
    life: Duration,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// Names and addresses, with commas: kv-0.example.org,10.0.0.1; *.kv.example.org is for all below
    #[arg(value_name = "HOSTS", value_delimiter = ',', required = true)]
    hosts: Vec<String>,
    /// Also for dialling, as members do among themselves
    #[arg(long)]
    peer: bool,
    /// For the member of this slot alone, also where the hosts are those of all
    #[arg(long, value_name = "SLOT", requires = "peer")]
    slot: Option<u16>,
    /// Name of the files [default: the first host]
    #[arg(long, value_name = "NAME")]
    out: Option<String>,
    #[command(flatten)]
    signing: SigningArgs,
}

#[derive(Debug, clap::Args)]
pub struct LeafArgs {
    /// Its common name
    name: String,
    /// Name of the files [default: NAME]
    #[arg(long, value_name = "NAME")]
    out: Option<String>,
    #[command(flatten)]
    signing: SigningArgs,
}

#[derive(Debug, clap::Args)]
pub struct SigningArgs {
    /// Where the CA is (ca.crt, ca.key), and where to put the files
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// The CA's certificate [default: ca.crt in the directory]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The CA's key [default: ca.key in the directory]
    #[arg(long, value_name = "FILE")]
    ca_key: Option<PathBuf>,
    /// How long it is valid; at most as long as its CA
    #[arg(long, value_name = "DURATION", default_value = "8760h", value_parser = duration::parse)]
    life: Duration,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// A PEM file
    file: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

pub fn run(command: CertCommand) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    match command {
        CertCommand::Ca(args) => {
            let made = mint::ca(&args.name, args.life)?;
            write(&env, &args.dir, "ca", &made, args.output)
        }
        CertCommand::Server(args) => {
            let usage = if args.peer { Use::Peer } else { Use::Server };
            let first = args.hosts.first().cloned().unwrap_or_default();
            let uris = args.slot.map(slot_uri).into_iter().collect();
            let subject = Subject { common_name: first.clone(), hosts: args.hosts, uris, usage };
            // A wildcard is no name for a file.
            let out = args.out.unwrap_or_else(|| first.replace('*', "any"));
            leaf(&env, &args.signing, &subject, &out)
        }
        CertCommand::Client(args) => {
            let subject =
                Subject { common_name: args.name.clone(), hosts: Vec::new(), uris: Vec::new(), usage: Use::Client };
            leaf(&env, &args.signing, &subject, &args.out.unwrap_or(args.name))
        }
        CertCommand::Show(args) => {
            let all = describe(&read(&env, &args.file)?).with_context(|| format!("{}", args.file.display()))?;
            Ok(match args.output {
                Format::Json => json_line(&all.iter().map(as_json).collect()),
                Format::Simple => all.iter().flat_map(shown).collect(),
            })
        }
    }
}

fn read(env: &Env, path: &Path) -> anyhow::Result<Vec<u8>> {
    read_bounded(&*env.disk, path, FILE_BYTES_MAX)
        .with_context(|| format!("{} cannot be read, expected a PEM file", path.display()))
}

fn leaf(env: &Env, signing: &SigningArgs, subject: &Subject, out: &str) -> anyhow::Result<Vec<u8>> {
    let path = |given: &Option<PathBuf>, name: &str| given.clone().unwrap_or_else(|| signing.dir.join(name));
    let (ca, key) = (path(&signing.ca, "ca.crt"), path(&signing.ca_key, "ca.key"));
    let hint = "make a CA first: `quorate cert ca`, or name it with --ca and --ca-key";
    let issuer = Issuer::read(&read(env, &ca).context(hint)?, &read(env, &key).context(hint)?)?;
    write(env, &signing.dir, out, &issuer.leaf(subject, signing.life)?, signing.output)
}

/// Writes `<name>.crt` and `<name>.key`, the key first: who waits for the certificate then has both.
fn write(env: &Env, dir: &Path, name: &str, made: &Made, format: Format) -> anyhow::Result<Vec<u8>> {
    ensure!(
        !name.is_empty() && !name.contains('/') && !name.starts_with('.'),
        "{name:?} is no name for files; give one with --out"
    );
    env.disk.create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    let (certificate, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    for path in [&certificate, &key] {
        ensure!(!env.disk.exists(path), "{} exists; move it away, or choose another name or --dir", path.display());
    }
    for (path, text) in [(&key, &made.key), (&certificate, &made.certificate)] {
        let file = env.disk.open(path, OpenMode::CreateNew).with_context(|| format!("{}", path.display()))?;
        file.write_at(text.as_bytes(), 0)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("{}", path.display()))?;
    }
    let facts = json!({ "certificate": certificate, "key": key });
    Ok(done(format, &facts, &format!("{}\n{}", certificate.display(), key.display())))
}

fn date(seconds: i64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64)).to_string()
}

fn uses(one: &Description) -> String {
    match (&one.uses[..], one.is_ca) {
        (_, true) => "signing others (a CA)".to_owned(),
        ([], _) => "anything".to_owned(),
        (uses, _) => uses.join(", "),
    }
}

fn shown(one: &Description) -> Vec<u8> {
    let rows = [
        ("subject", one.subject.clone()),
        ("names", one.names.join(", ")),
        ("issuer", one.issuer.clone()),
        ("serial", one.serial.clone()),
        ("begins", date(one.begin)),
        ("ends", date(one.end)),
        ("for", uses(one)),
    ];
    table(&["CERTIFICATE", ""], &rows.map(|(name, value)| vec![name.to_owned(), value]))
}

fn as_json(one: &Description) -> serde_json::Value {
    json!({
        "subject": one.subject,
        "names": one.names,
        "issuer": one.issuer,
        "serial": one.serial,
        "notBefore": date(one.begin),
        "notAfter": date(one.end),
        "ca": one.is_ca,
        "uses": one.uses,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: CertCommand,
    }

    fn cert(dir: &Path, words: &[&str]) -> anyhow::Result<String> {
        let dir = ["--dir", dir.to_str().unwrap()];
        let line = ["cert"].iter().chain(words).chain(if words[0] == "show" { &[][..] } else { &dir });
        run(Line::try_parse_from(line).unwrap().command).map(|out| String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_ca_and_what_it_signs_are_made_and_shown_and_nothing_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let error = cert(dir.path(), &["server", "a"]).unwrap_err();
        assert!(format!("{error:#}").contains("quorate cert ca"), "{error:#}");
        cert(dir.path(), &["ca", "--name", "ours"]).unwrap();
        assert!(cert(dir.path(), &["ca"]).unwrap_err().to_string().contains("exists"));
        cert(dir.path(), &["server", "*.kv.example,10.0.0.1", "--peer"]).unwrap();
        let text = cert(dir.path(), &["client", "alice", "-o", "json"]).unwrap();
        let made: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(made, json!({ "certificate": file("alice.crt"), "key": file("alice.key") }));
        for key in ["ca.key", "any.kv.example.key", "alice.key"] {
            let mode = std::fs::metadata(file(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{key} is for others");
        }
        let text = cert(dir.path(), &["show", file("any.kv.example.crt").to_str().unwrap()]).unwrap();
        for part in ["CN=*.kv.example", "*.kv.example, 10.0.0.1", "CN=ours", "server, client"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = cert(dir.path(), &["show", "-o", "json", file("alice.crt").to_str().unwrap()]).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json[0]["uses"], &json[0]["ca"]), (&json!(["client"]), &json!(false)), "{text}");
        assert!(cert(dir.path(), &["client", "../x"]).unwrap_err().to_string().contains("--out"));
        let error = cert(dir.path(), &["show", file("alice.key").to_str().unwrap()]).unwrap_err();
        assert!(format!("{error:#}").contains("no certificate"), "{error:#}");
    }
}
