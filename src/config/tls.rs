//! `[client_tls]` and `[peer_tls]`: how the two ports are protected, and by what each side proves who it is.
//!
//! Invariant: a setting that would have no effect in its mode is refused, for whoever sets it counts on it.
//! Absent: what the files hold (`secure`).

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::sections::words;
use super::validate::Faults;
use super::{Config, units};

/// `[client_tls]`: TLS of the clients' port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientTls {
    /// Off: whoever starts a server to try it has no certificate.
    #[serde(with = "units::text")]
    pub mode: TlsMode,
    /// This member's certificate, and those between it and its CA.
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// A CA with which this member makes its own certificate; with two in the file the first one signs.
    pub issuer_cert_file: PathBuf,
    pub issuer_key_file: PathBuf,
    /// Names and addresses that such a certificate is for, beside those at which this member knows that it is reached.
    #[serde(with = "units::list")]
    pub names: Vec<String>,
    /// How long such a certificate is valid; at half of it there is a new one.
    #[serde(with = "units::duration")]
    pub lifetime: Duration,
    /// The CAs whose clients may connect; with two of them one replaces the other. Empty: the issuer's.
    pub ca_file: PathBuf,
    /// Certificates of clients that were taken back.
    pub crl_file: PathBuf,
    /// Whether clients must show certificates.
    #[serde(with = "units::text")]
    pub client_cert: ClientCert,
    /// Names of which a client's certificate must have one; empty: any.
    #[serde(with = "units::list")]
    pub allowed_names: Vec<String>,
    /// Which name of a client's certificate is its user, while authentication is on and its request shows no token.
    #[serde(with = "units::text")]
    pub user: CertUser,
    /// The oldest version that is spoken.
    #[serde(with = "units::text")]
    pub min_version: TlsVersion,
    /// Cipher suites of TLS 1.2; empty: all that are thought safe.
    #[serde(with = "units::list")]
    pub cipher_suites: Vec<String>,
}

/// `[peer_tls]`: TLS between members. Both sides always show certificates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerTls {
    #[serde(with = "units::text")]
    pub mode: TlsMode,
    /// This member's certificate; it shows it where it is dialled and where it dials.
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// As `client_tls` has them.
    pub issuer_cert_file: PathBuf,
    pub issuer_key_file: PathBuf,
    #[serde(with = "units::list")]
    pub names: Vec<String>,
    #[serde(with = "units::duration")]
    pub lifetime: Duration,
    /// The CAs of the members, which are not those of clients; with two of them one replaces the other. Empty: the issuer's.
    pub ca_file: PathBuf,
    pub crl_file: PathBuf,
    /// Names of which the certificate of a member that dials must have one; empty: any.
    #[serde(with = "units::list")]
    pub allowed_names: Vec<String>,
    /// A member that dials must also have a certificate for the address at which the membership has it.
    pub check_address: bool,
    /// Whether members without TLS are heard.
    #[serde(with = "units::text")]
    pub plain: PlainPeers,
    #[serde(with = "units::text")]
    pub min_version: TlsVersion,
    #[serde(with = "units::list")]
    pub cipher_suites: Vec<String>,
}

/// Of a certificate that a member makes: whoever steals it has it for days, and a member that cannot read its CA has days to be helped.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

impl Default for ClientTls {
    fn default() -> Self {
        Self {
            mode: TlsMode::default(),
            cert_file: PathBuf::new(),
            key_file: PathBuf::new(),
            issuer_cert_file: PathBuf::new(),
            issuer_key_file: PathBuf::new(),
            names: Vec::new(),
            lifetime: LIFETIME,
            ca_file: PathBuf::new(),
            crl_file: PathBuf::new(),
            client_cert: ClientCert::default(),
            allowed_names: Vec::new(),
            user: CertUser::default(),
            min_version: TlsVersion::default(),
            cipher_suites: Vec::new(),
        }
    }
}

impl Default for PeerTls {
    fn default() -> Self {
        Self {
            mode: TlsMode::default(),
            cert_file: PathBuf::new(),
            key_file: PathBuf::new(),
            issuer_cert_file: PathBuf::new(),
            issuer_key_file: PathBuf::new(),
            names: Vec::new(),
            lifetime: LIFETIME,
            ca_file: PathBuf::new(),
            crl_file: PathBuf::new(),
            allowed_names: Vec::new(),
            check_address: true,
            plain: PlainPeers::default(),
            min_version: TlsVersion::default(),
            cipher_suites: Vec::new(),
        }
    }
}

/// Where a port's certificate comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// There is none: plain text.
    #[default]
    Off,
    /// From files, which are read anew when they change.
    Files,
    /// The member makes it, with a CA from files, and makes another before it ends.
    Auto,
}

/// Whether clients must show certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCert {
    /// They are not asked for one.
    #[default]
    Off,
    /// One that is shown must be right.
    Optional,
    Required,
}

/// Which user a client's certificate stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CertUser {
    /// The one with its common name, as in etcd.
    #[default]
    CommonName,
    /// The one with the first of its alternative names that is a DNS name or a URI (SPIFFE ids are URIs).
    San,
    /// None: it lets in, and who asks for something shows a token.
    Nobody,
}

/// Whether a member with TLS hears, and speaks to, members without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlainPeers {
    #[default]
    Refuse,
    /// Until all members of the committed membership have said that they have TLS: the way there.
    UntilAll,
    /// And this member does not say so: the way back.
    Accept,
}

/// Versions of TLS that are spoken; older ones are broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    #[default]
    V1_2,
    V1_3,
}

words!(TlsMode { Off = "off", Files = "files", Auto = "auto" });
words!(PlainPeers { Refuse = "refuse", UntilAll = "until-all", Accept = "accept" });
words!(CertUser { CommonName = "common-name", San = "san", Nobody = "none" });
words!(ClientCert { Off = "off", Optional = "optional", Required = "required" });
words!(TlsVersion { V1_2 = "1.2", V1_3 = "1.3" });

/// Shorter, and a certificate would be made with every look at the files.
const LIFETIME_MIN: Duration = Duration::from_secs(10);

impl Config {
    pub(super) fn check_tls(&self, faults: &mut Faults) {
        let (client, peer) = (&self.client_tls, &self.peer_tls);
        let asks = client.client_cert != ClientCert::Off;
        Section {
            name: "client_tls",
            mode: client.mode,
            own: [&client.cert_file, &client.key_file],
            issuer: [&client.issuer_cert_file, &client.issuer_key_file],
            others: [&client.ca_file, &client.crl_file],
            lifetime: client.lifetime,
            asks,
        }
        .check(faults);
        Section {
            name: "peer_tls",
            mode: peer.mode,
            own: [&peer.cert_file, &peer.key_file],
            issuer: [&peer.issuer_cert_file, &peer.issuer_key_file],
            others: [&peer.ca_file, &peer.crl_file],
            lifetime: peer.lifetime,
            asks: true,
        }
        .check(faults);
        let (is_off, plain) = (peer.mode == TlsMode::Off, peer.plain);
        let (expected, action) = ("refuse, for peer_tls.mode is off", "leave it out: without TLS all is plain");
        faults.check(!is_off || plain == PlainPeers::Refuse, "peer_tls.plain", plain, expected, action);
        if client.mode == TlsMode::Off {
            let (expected, action) = ("off, for client_tls.mode is off", "set the mode to files or auto");
            faults.check(!asks, "client_tls.client_cert", client.client_cert, expected, action);
        } else if !asks {
            let unused = !client.allowed_names.is_empty() || is_named(&client.ca_file) || is_named(&client.crl_file);
            let expected = "optional or required, with client_tls.ca_file";
            let action = "without it clients show no certificate that ca_file, crl_file and allowed_names could be for";
            faults.check(!unused, "client_tls.client_cert", client.client_cert, expected, action);
        }
        let is_of_use = asks || client.user == CertUser::default();
        let (expected, action) = ("common-name, for client_tls.client_cert is off", "clients show no certificate then");
        faults.check(is_of_use, "client_tls.user", client.user, expected, action);
        for (section, version, suites) in [
            ("client_tls", client.min_version, &client.cipher_suites),
            ("peer_tls", peer.min_version, &peer.cipher_suites),
        ] {
            let fits = version == TlsVersion::V1_2 || suites.is_empty();
            let expected = "none, for min_version is 1.3, whose suites are fixed";
            let key = format!("{section}.cipher_suites");
            faults.check(fits, &key, suites.join(","), expected, "leave them out, or lower the version");
        }
    }
}

fn is_named(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

/// What both sections have.
struct Section<'a> {
    name: &'static str,
    mode: TlsMode,
    own: [&'a PathBuf; 2],
    issuer: [&'a PathBuf; 2],
    /// Of those who connect.
    others: [&'a PathBuf; 2],
    lifetime: Duration,
    /// Those who connect must, or may, show certificates.
    asks: bool,
}

impl Section<'_> {
    fn check(&self, faults: &mut Faults) {
        let [[cert, key], [issuer_cert, issuer_key], [ca, crl]] = [self.own, self.issuer, self.others];
        let (files, auto) = (self.mode == TlsMode::Files, self.mode == TlsMode::Auto);
        // In which modes a file is of use, and in which it must be there.
        for (file, path, is_used, is_needed) in [
            ("cert_file", cert, files, files),
            ("key_file", key, files, files),
            ("issuer_cert_file", issuer_cert, auto, auto),
            ("issuer_key_file", issuer_key, auto, auto),
            ("ca_file", ca, files || auto, files && self.asks),
            ("crl_file", crl, files || auto, false),
        ] {
            let setting = format!("{}.{file}", self.name);
            let got = if is_named(path) { format!("{path:?}") } else { "nothing".to_owned() };
            if !is_used {
                let expected = format!("nothing, for {}.mode is {}", self.name, self.mode);
                faults.check(
                    !is_named(path),
                    &setting,
                    got,
                    expected,
                    "set the mode to what it is for, or leave it out",
                );
            } else if is_needed {
                faults.check(
                    is_named(path),
                    &setting,
                    got,
                    "the path of a PEM file",
                    "name it; `quorate cert` can make one",
                );
            }
        }
        let (key, got) = (format!("{}.lifetime", self.name), humantime::format_duration(self.lifetime));
        faults.check(self.lifetime >= LIFETIME_MIN, &key, got, "at least 10s", "raise it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        config.validate().map(|()| "valid".to_owned()).unwrap_or_else(|error| error.to_string())
    }

    fn with_files(config: &mut Config) {
        let (client, peer) = (&mut config.client_tls, &mut config.peer_tls);
        (client.mode, peer.mode) = (TlsMode::Files, TlsMode::Files);
        for file in
            [&mut client.cert_file, &mut client.key_file, &mut peer.cert_file, &mut peer.key_file, &mut peer.ca_file]
        {
            *file = "/x".into();
        }
    }

    #[test]
    fn what_a_mode_needs_must_be_there_and_what_it_does_not_use_must_not() {
        type Change = fn(&mut Config);
        let cases: &[(&str, Change)] = &[
            ("client_tls.cert_file: got nothing", |c| c.client_tls.cert_file = "".into()),
            ("client_tls.key_file: got nothing", |c| c.client_tls.key_file = "".into()),
            ("client_tls.ca_file: got nothing", |c| c.client_tls.client_cert = ClientCert::Required),
            ("client_tls.client_cert: got off", |c| c.client_tls.ca_file = "/ca".into()),
            ("client_tls.client_cert: got off", |c| c.client_tls.crl_file = "/crl".into()),
            ("client_tls.client_cert: got off", |c| c.client_tls.allowed_names = vec!["a".into()]),
            ("client_tls.cert_file: got \"/x\", expected nothing", |c| c.client_tls.mode = TlsMode::Off),
            ("client_tls.user: got san", |c| c.client_tls.user = CertUser::San),
            ("peer_tls.ca_file: got nothing", |c| c.peer_tls.ca_file = "".into()),
            ("peer_tls.ca_file: got \"/x\", expected nothing", |c| c.peer_tls.mode = TlsMode::Off),
            ("peer_tls.cert_file: got \"/x\", expected nothing", |c| c.peer_tls.mode = TlsMode::Auto),
            ("peer_tls.issuer_key_file: got nothing", |c| c.peer_tls.mode = TlsMode::Auto),
            ("client_tls.issuer_key_file: got \"/i\", expected nothing", |c| {
                c.client_tls.issuer_key_file = "/i".into();
            }),
            ("peer_tls.lifetime: got 9s", |c| c.peer_tls.lifetime = Duration::from_secs(9)),
            ("peer_tls.cipher_suites: got S", |c| {
                (c.peer_tls.min_version, c.peer_tls.cipher_suites) = (TlsVersion::V1_3, vec!["S".into()]);
            }),
        ];
        assert_eq!(fault(with_files), "valid");
        for (expected, change) in cases {
            let message = fault(|config| {
                with_files(config);
                change(config);
            });
            assert!(message.contains(expected), "{expected}: {message}");
        }
        let message = fault(|config| config.client_tls.client_cert = ClientCert::Required);
        assert!(message.contains("client_tls.client_cert: got required, expected off"), "{message}");
    }
}
