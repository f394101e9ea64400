//! The TLS of one port, as it is now, and its change when the files change.
//!
//! The files are read every few seconds, through whatever links: a Secret of Kubernetes changes by the swap of one. What was read together
//! is in force when it fits together, for connections that come from then on; those that are open live on. Where the files are a CA's
//! (mode `auto`), what is in force is a certificate that was made with it, whose key is nowhere but in memory, and that is replaced at
//! half of its life.
//! Invariants: files that cannot be read, or do not fit together, keep what was in force. That is said when two looks in a row have found
//! it, since certificate and key may be written one after the other; at SIGHUP at once. A certificate that ends is in force all the same,
//! and is told of.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use tokio_rustls::rustls::ServerConfig;

use super::certificate::slot_uri;
use super::mint::{Issuer, Subject, Use};
use super::tls::{Dialer, Material, Read, Rules};
use super::{Error, since_1970};
use crate::config::{self, ClientCert, ClientTls, Config, MemberKind, PeerTls, PlainPeers, TlsMode};
use crate::env::{Disk, Env, Instant, Pool, interval};
use crate::identity::{host_port, read_bounded};
use crate::metrics::{self, metrics};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(2);
/// A bundle of all public CAs has a quarter of that.
const FILE_BYTES_MAX: usize = 1 << 20;
/// A certificate that ends within this is told of.
const END_TOLD: Duration = Duration::from_secs(3 * 24 * 3600);
/// Handshakes that fail are logged so often.
const FAILURES_TOLD: Duration = Duration::from_secs(10);

/// Both ports' TLS.
#[derive(Clone, Default)]
pub struct Ports {
    /// `None`: plain text.
    pub client: Option<Arc<Port>>,
    pub peer: Option<Arc<Port>>,
}

impl Ports {
    /// Reads what the settings name, or says what is wrong with it; `this` is who the certificates are for, where they are made here.
    pub fn open(disk: &dyn Disk, config: &Config, this: &config::Node) -> Result<Self, Error> {
        // Of whoever owns a slot: others have ids that say nothing.
        let owned = (config.cluster.kind == MemberKind::Slot).then(|| slot_uri(this.slot));
        let subject = |section: &str, names: &[String], hosts: Vec<String>, usage| {
            let mut hosts: Vec<String> = hosts.into_iter().chain(names.iter().cloned()).collect();
            hosts.sort();
            hosts.dedup();
            tracing::debug!(port = section, ?hosts, "names of the certificate");
            let uris = owned.iter().filter(|_| usage == Use::Peer).cloned().collect();
            Subject { common_name: this.name.clone(), hosts, uris, usage }
        };
        let (client, peer) = (&config.client_tls, &config.peer_tls);
        let clients = Port::of_clients(disk, client, || {
            subject("client_tls", &client.names, hosts_of_clients(this), Use::Server)
        })?;
        let peers = Port::of_peers(disk, peer, || {
            let addresses = [&this.advertise_peer].into_iter().chain(&this.more_peer_addresses);
            subject("peer_tls", &peer.names, addresses.filter_map(|address| host_of(address)).collect(), Use::Peer)
        })?;
        Ok(Self { client: clients, peer: peers })
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Port>> {
        self.client.iter().chain(&self.peer)
    }

    /// Follows the files, until shutdown.
    pub fn watch(&self, env: &Env) {
        for port in self.all() {
            env.spawn(port.clone().run(env.clone()));
        }
    }

    /// What a person should know: the name of the condition, and a sentence.
    pub fn notes(&self) -> Vec<(&'static str, String)> {
        self.all().flat_map(|port| port.notes()).collect()
    }
}

fn host_of(address: &str) -> Option<String> {
    host_port(address).map(|(host, _)| host.trim_matches(['[', ']']).to_owned())
}

/// Where clients reach this member, as far as it knows.
fn hosts_of_clients(this: &config::Node) -> Vec<String> {
    let urls = this.advertise_client.iter().filter_map(|url| host_of(url.split_once("://")?.1.trim_end_matches('/')));
    let headless = this.peers.iter().filter_map(|peers| peers.headless()).filter_map(host_of);
    let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    urls.chain(host_of(&this.advertise_peer)).chain(headless).chain([this.name.clone()]).chain(local).collect()
}

/// Where one port's files are; an empty path is none.
#[derive(Clone)]
struct Files {
    /// The port's own, or a CA's with which its own is made.
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    crl: PathBuf,
    mint: Option<Mint>,
}

/// How the port's own certificate is made.
#[derive(Clone)]
struct Mint {
    subject: Subject,
    lifetime: Duration,
}

impl Files {
    fn read(&self, disk: &dyn Disk) -> Result<Read, Error> {
        let read = |key: &str, path: &Path| match path.as_os_str().is_empty() {
            true => Ok(Vec::new()),
            false => read_bounded(disk, path, FILE_BYTES_MAX).map_err(|error| {
                Error::new(format!("{key} ({}) cannot be read: {error}; expected a PEM file", path.display()))
            }),
        };
        let (certificate, key) =
            if self.mint.is_some() { ("issuer_cert_file", "issuer_key_file") } else { ("cert_file", "key_file") };
        let certificate = read(certificate, &self.certificate)?;
        let ca = match read("ca_file", &self.ca)? {
            // Whom the CA signs for is trusted.
            none if none.is_empty() && self.mint.is_some() => certificate.clone(),
            ca => ca,
        };
        Ok(Read { certificate, key: read(key, &self.key)?, ca, crl: read("crl_file", &self.crl)? })
    }

    /// What follows from the files.
    fn material(&self, read: &Read, rules: &Rules) -> Result<Material, Error> {
        let Some(Mint { subject, lifetime }) = &self.mint else { return Material::new(read, rules) };
        let made = Issuer::read(&read.certificate, &read.key)?.leaf(subject, *lifetime)?;
        let own = Read { certificate: made.certificate.into(), key: made.key.into(), ..read.clone() };
        Material::new(&own, rules)
    }
}

/// What is in force.
struct Now {
    read: Read,
    material: Material,
    /// When a certificate that was made here is replaced, in seconds since 1970.
    renew_at: Option<i64>,
}

impl Now {
    fn new(read: Read, material: Material, files: &Files) -> Self {
        let now = since_1970();
        let renew_at = files.mint.as_ref().map(|_| now + (material.end - now) / 2);
        Self { read, material, renew_at }
    }
}

/// What was found in files that are not in force.
#[derive(Default)]
struct Fault {
    text: String,
    told: bool,
}

/// See the module's head.
pub struct Port {
    /// The section of its settings.
    section: &'static str,
    files: Files,
    rules: Rules,
    plain: PlainPeers,
    /// Members without TLS are heard at the moment.
    hears_plain: AtomicBool,
    now: RwLock<Arc<Now>>,
    fault: Mutex<Option<Fault>>,
    /// When a failed handshake was logged.
    failure_told: Mutex<Option<Instant>>,
    counters: metrics::Tls,
}

impl Port {
    fn of_clients(
        disk: &dyn Disk,
        settings: &ClientTls,
        subject: impl FnOnce() -> Subject,
    ) -> Result<Option<Arc<Self>>, Error> {
        let is_auto = settings.mode == TlsMode::Auto;
        let files = Files {
            certificate: if is_auto { &settings.issuer_cert_file } else { &settings.cert_file }.clone(),
            key: if is_auto { &settings.issuer_key_file } else { &settings.key_file }.clone(),
            ca: settings.ca_file.clone(),
            crl: settings.crl_file.clone(),
            mint: is_auto.then(|| Mint { subject: subject(), lifetime: settings.lifetime }),
        };
        let rules = Rules {
            certificates: settings.client_cert,
            allowed_names: settings.allowed_names.clone(),
            min_version: settings.min_version,
            cipher_suites: settings.cipher_suites.clone(),
            dials: false,
        };
        Self::open(disk, "client_tls", settings.mode, PlainPeers::Refuse, files, rules)
    }

    fn of_peers(
        disk: &dyn Disk,
        settings: &PeerTls,
        subject: impl FnOnce() -> Subject,
    ) -> Result<Option<Arc<Self>>, Error> {
        let is_auto = settings.mode == TlsMode::Auto;
        let files = Files {
            certificate: if is_auto { &settings.issuer_cert_file } else { &settings.cert_file }.clone(),
            key: if is_auto { &settings.issuer_key_file } else { &settings.key_file }.clone(),
            ca: settings.ca_file.clone(),
            crl: settings.crl_file.clone(),
            mint: is_auto.then(|| Mint { subject: subject(), lifetime: settings.lifetime }),
        };
        let rules = Rules {
            certificates: ClientCert::Required,
            allowed_names: settings.allowed_names.clone(),
            min_version: settings.min_version,
            cipher_suites: settings.cipher_suites.clone(),
            dials: true,
        };
        Self::open(disk, "peer_tls", settings.mode, settings.plain, files, rules)
    }

    fn open(
        disk: &dyn Disk,
        section: &'static str,
        mode: TlsMode,
        plain: PlainPeers,
        files: Files,
        rules: Rules,
    ) -> Result<Option<Arc<Self>>, Error> {
        if mode == TlsMode::Off {
            return Ok(None);
        }
        let named = |error: Error| Error::new(format!("{section}: {error}; correct the setting or the file"));
        let read = files.read(disk).map_err(named)?;
        let material = files.material(&read, &rules).map_err(named)?;
        let port = Self {
            section,
            now: RwLock::new(Arc::new(Now::new(read, material, &files))),
            files,
            rules,
            plain,
            hears_plain: AtomicBool::new(plain == PlainPeers::Accept),
            fault: Mutex::default(),
            failure_told: Mutex::default(),
            counters: metrics().tls(section),
        };
        port.show_ends();
        Ok(Some(Arc::new(port)))
    }

    /// For a connection that is accepted now.
    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.now.read().material.server.clone()
    }

    /// For a connection that this member makes now; `None` on a port whose certificate is shown by nobody who dials.
    pub fn dialer(&self) -> Option<Dialer> {
        self.now.read().material.dialer.clone()
    }

    /// Whether members without TLS are heard, and spoken to, at the moment.
    pub fn hears_plain(&self) -> bool {
        self.hears_plain.load(Ordering::Relaxed)
    }

    /// To be called with every membership that is committed: who in it has no TLS. `None`: there is none, and whoever forms a cluster does
    /// so with TLS, if all of them can.
    pub fn note_members(&self, without_tls: Option<Vec<String>>) {
        let hears = match self.plain {
            PlainPeers::Refuse => false,
            PlainPeers::Accept => true,
            PlainPeers::UntilAll => without_tls.as_ref().is_some_and(|names| !names.is_empty()),
        };
        if self.hears_plain.swap(hears, Ordering::Relaxed) != hears {
            // Without a membership there is nothing to say of it.
            let Some(without) = without_tls else { return };
            match hears {
                true => {
                    let without = without.join(", ");
                    tracing::warn!(without, "members without TLS are heard: not all have it yet");
                }
                false => tracing::info!("all members have TLS: nothing else is heard any more"),
            }
        }
    }

    /// Counts it, and says it now and then: who tries often must not fill the log.
    pub(super) fn handshake_failed(&self, from: IpAddr, error: &io::Error) {
        self.counters.handshake_failures.inc();
        let mut told = self.failure_told.lock();
        // Who connects and leaves again, as some probes do, is not worth a line.
        if error.kind() == io::ErrorKind::UnexpectedEof || told.is_some_and(|at| at.elapsed() < FAILURES_TOLD) {
            return;
        }
        *told = Some(Instant::now());
        tracing::warn!(port = self.section, %from, %error, "a TLS handshake failed");
    }

    async fn run(self: Arc<Self>, env: Env) {
        let (mut tick, mut asked) = (interval(LOOK), env.reread.subscribe());
        loop {
            let asked = tokio::select! {
                _ = tick.tick() => false,
                Ok(()) = asked.changed() => true,
                () = env.shutdown.cancelled() => return,
            };
            let (port, disk) = (self.clone(), env.disk.clone());
            env.long(Pool::Disk, move || port.look(&*disk, asked)).await;
        }
    }

    /// Reads the files, and puts them in force if they are others and fit together.
    fn look(&self, disk: &dyn Disk, asked: bool) {
        let read = match self.files.read(disk) {
            Ok(read) => read,
            Err(error) => return self.refuse(&error, asked),
        };
        let (is_same, renew_at) = {
            let now = self.now.read();
            (now.read == read, now.renew_at)
        };
        let is_due = renew_at.is_some_and(|at| at <= since_1970());
        if is_same && !is_due {
            if self.fault.lock().take().is_some_and(|fault| fault.told) {
                self.counters.reload_failing.set(0);
                tracing::info!(port = self.section, "the TLS files are again as those in force");
            }
            return;
        }
        match self.files.material(&read, &self.rules) {
            Ok(material) => {
                *self.now.write() = Arc::new(Now::new(read, material, &self.files));
                *self.fault.lock() = None;
                self.counters.reload_failing.set(0);
                self.counters.reloads.inc();
                self.show_ends();
                let what = if is_same { "a new certificate was made" } else { "new TLS files are in force" };
                tracing::info!(port = self.section, "{what}, for new connections");
            }
            Err(error) => self.refuse(&error, asked),
        }
    }

    fn refuse(&self, error: &Error, asked: bool) {
        let text = error.to_string();
        let mut fault = self.fault.lock();
        let again = fault.as_ref().is_some_and(|fault| fault.text == text);
        if fault.as_ref().is_some_and(|fault| again && fault.told) {
            return;
        }
        let told = asked || again;
        if told {
            self.counters.reload_failing.set(1);
            tracing::error!(
                port = self.section,
                error = text,
                "new TLS files are not taken; the old ones stay in force"
            );
        }
        *fault = Some(Fault { text, told });
    }

    fn show_ends(&self) {
        let now = self.now.read();
        self.counters.end(metrics::TlsEnd::Certificate, now.material.end);
        if let Some(end) = now.material.ca_end {
            self.counters.end(metrics::TlsEnd::Ca, end);
        }
    }

    fn notes(&self) -> Vec<(&'static str, String)> {
        let mut notes = Vec::new();
        if let Some(fault) = self.fault.lock().as_ref().filter(|fault| fault.told) {
            let (section, text) = (self.section, &fault.text);
            notes.push((
                "tls-files",
                format!("new TLS files are not taken, the old ones stay in force: {section}: {text}"),
            ));
        }
        if self.hears_plain() {
            let until = match self.plain {
                PlainPeers::UntilAll => "until all have it",
                PlainPeers::Accept | PlainPeers::Refuse => "as peer_tls.plain says",
            };
            let sentence =
                format!("members without TLS are heard, {until}; whoever reaches the peer port can pass for one");
            notes.push(("tls-plain", sentence));
        }
        let now = self.now.read().clone();
        let ends = [("certificate", Some(now.material.end)), ("CA", now.material.ca_end)];
        for (what, end) in ends.into_iter().filter_map(|(what, end)| Some((what, end?))) {
            let left = end - since_1970();
            // One that is made here is replaced long before.
            let told = if what == "certificate" && now.renew_at.is_some() { 0 } else { END_TOLD.as_secs() as i64 };
            if left < told {
                let at = UNIX_EPOCH + Duration::from_secs(end.max(0) as u64);
                let ends = if left < 0 { "has ended" } else { "ends" };
                let at = humantime::format_rfc3339_seconds(at);
                notes.push(("certificate-ends", format!("{}: the {what} {ends} at {at}", self.section)));
            }
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::super::certificate::describe;
    use super::super::mint::{self, Made};
    use super::*;
    use crate::config::TlsVersion;

    /// Nobody is told of ends that are so far away.
    const LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

    fn subject() -> Subject {
        Subject { common_name: "kv-0".into(), hosts: vec!["127.0.0.1".into()], uris: Vec::new(), usage: Use::Peer }
    }

    fn leaf(ca: &Made) -> (String, String) {
        let issuer = Issuer::read(ca.certificate.as_bytes(), ca.key.as_bytes()).unwrap();
        let made = issuer.leaf(&subject(), LIFE).unwrap();
        (made.certificate, made.key)
    }

    fn open(disk: &dyn Disk, settings: &PeerTls) -> Result<Arc<Port>, Error> {
        Port::of_peers(disk, settings, subject).map(|port| port.expect("the mode is not off"))
    }

    fn settings(dir: &Path) -> PeerTls {
        let file = |name: &str| dir.join(name);
        PeerTls {
            mode: TlsMode::Files,
            cert_file: file("tls.crt"),
            key_file: file("tls.key"),
            ca_file: file("ca.crt"),
            ..PeerTls::default()
        }
    }

    fn write(dir: &Path, (certificate, key): &(String, String), ca: &str) {
        for (name, text) in [("tls.crt", certificate), ("tls.key", key), ("ca.crt", &ca.to_owned())] {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn new_files_are_in_force_and_broken_ones_keep_the_old_and_are_told_of_at_the_second_look() {
        let (dir, env, ca) = (tempfile::tempdir().unwrap(), Env::real(), mint::ca("ca", LIFE).unwrap());
        let (one, other) = (leaf(&ca), leaf(&ca));
        write(dir.path(), &one, &ca.certificate);
        let port = open(&*env.disk, &settings(dir.path())).unwrap();
        let (look, first) = (|asked| port.look(&*env.disk, asked), port.server());
        look(false);
        assert!(Arc::ptr_eq(&first, &port.server()), "nothing changed");
        // Certificate and key of two.
        write(dir.path(), &(one.0.clone(), other.1.clone()), &ca.certificate);
        look(false);
        assert_eq!(port.notes(), Vec::new(), "it may be half written");
        look(false);
        assert!(Arc::ptr_eq(&first, &port.server()), "the old stays in force");
        let notes = port.notes();
        assert!(
            notes.len() == 1 && notes[0].1.contains("do not fit together") && notes[0].1.contains("peer_tls"),
            "{notes:?}"
        );
        write(dir.path(), &other, &ca.certificate);
        look(false);
        assert!(!Arc::ptr_eq(&first, &port.server()));
        assert_eq!(port.notes(), Vec::new());
        // What cannot be read is told of at once, if somebody asked for a look.
        let second = port.server();
        std::fs::remove_file(dir.path().join("ca.crt")).unwrap();
        look(true);
        assert!(port.notes()[0].1.contains("ca_file"), "{:?}", port.notes());
        assert!(Arc::ptr_eq(&second, &port.server()));
        write(dir.path(), &other, &ca.certificate);
        look(false);
        assert_eq!(port.notes(), Vec::new(), "they are as before");
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_place() {
        let (dir, env, ca) = (tempfile::tempdir().unwrap(), Env::real(), mint::ca("ca", LIFE).unwrap());
        let leaf = leaf(&ca);
        let refusal = |settings: &PeerTls| match open(&*env.disk, settings) {
            Ok(_) => panic!("it is taken"),
            Err(error) => error.to_string(),
        };
        let settings = settings(dir.path());
        assert!(refusal(&settings).contains("tls.crt) cannot be read"), "{}", refusal(&settings));
        for (files, ca, expected) in [
            ((String::new(), leaf.1.clone()), ca.certificate.clone(), "cert_file: no certificate"),
            ((leaf.0.clone(), "x".to_owned()), ca.certificate.clone(), "key_file: "),
            ((leaf.0.clone(), leaf.1.clone()), "x".to_owned(), "ca_file: no certificate"),
        ] {
            write(dir.path(), &files, &ca);
            let text = refusal(&settings);
            assert!(text.starts_with("peer_tls: ") && text.contains(expected) && !text.contains('\n'), "{text}");
        }
        write(dir.path(), &leaf, &ca.certificate);
        let suites = PeerTls { cipher_suites: vec!["TLS_RSA_WITH_RC4_128_SHA".into()], ..settings.clone() };
        assert!(refusal(&suites).contains("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"), "{}", refusal(&suites));
        for min_version in [TlsVersion::V1_2, TlsVersion::V1_3] {
            let valid = PeerTls { min_version, ..settings.clone() };
            assert!(open(&*env.disk, &valid).is_ok());
        }
    }

    #[test]
    fn a_member_makes_its_certificate_and_another_before_it_ends() {
        let (dir, env) = (tempfile::tempdir().unwrap(), Env::real());
        let (old, new) = (mint::ca("old", LIFE).unwrap(), mint::ca("new", LIFE).unwrap());
        let file = |name: &str| dir.path().join(name);
        let write = |ca: &Made, bundle: &str| {
            std::fs::write(file("ca.crt"), bundle).unwrap();
            std::fs::write(file("ca.key"), &ca.key).unwrap();
        };
        write(&old, &old.certificate);
        let mut settings = PeerTls {
            mode: TlsMode::Auto,
            issuer_cert_file: file("ca.crt"),
            issuer_key_file: file("ca.key"),
            ..PeerTls::default()
        };
        let port = open(&*env.disk, &settings).unwrap();
        let (first, end) = (port.server(), port.now.read().material.end);
        assert!(end > since_1970() && end <= describe(old.certificate.as_bytes()).unwrap()[0].end);
        port.look(&*env.disk, false);
        assert!(Arc::ptr_eq(&first, &port.server()), "it is not due");
        // The CA is replaced: the new one signs, and both are trusted.
        write(&new, &format!("{}{}", new.certificate, old.certificate));
        port.look(&*env.disk, false);
        let second = port.server();
        assert!(!Arc::ptr_eq(&first, &second));
        // A key that is not the CA's changes nothing.
        write(&old, &new.certificate);
        port.look(&*env.disk, true);
        assert!(
            Arc::ptr_eq(&second, &port.server()) && port.notes()[0].1.contains("the CA's key"),
            "{:?}",
            port.notes()
        );
        // At half of its life there is another.
        write(&new, &new.certificate);
        settings.lifetime = Duration::from_secs(0);
        let port = open(&*env.disk, &settings).unwrap();
        let first = port.server();
        port.look(&*env.disk, false);
        assert!(!Arc::ptr_eq(&first, &port.server()));
    }

    #[test]
    fn plain_members_are_heard_until_all_have_tls_and_never_by_who_has_no_cluster() {
        let (dir, env, ca) = (tempfile::tempdir().unwrap(), Env::real(), mint::ca("ca", LIFE).unwrap());
        write(dir.path(), &leaf(&ca), &ca.certificate);
        let heard = |plain: PlainPeers| {
            let port = open(&*env.disk, &PeerTls { plain, ..settings(dir.path()) }).unwrap();
            let mut heard = vec![port.hears_plain()];
            for without in [None, Some(vec!["kv-1".to_owned()]), Some(Vec::new()), Some(vec!["kv-1".to_owned()])] {
                port.note_members(without);
                heard.push(port.hears_plain());
                assert_eq!(port.notes().iter().any(|note| note.0 == "tls-plain"), port.hears_plain());
            }
            heard
        };
        assert_eq!(heard(PlainPeers::Refuse), [false; 5]);
        assert_eq!(heard(PlainPeers::UntilAll), [false, false, true, false, true]);
        assert_eq!(heard(PlainPeers::Accept), [true; 5]);
    }
}
