//! What the certificate of the other end of a connection says.
//!
//! Owns the reading of names. Its chain was verified before it comes here. Absent: what follows from a name.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::server::ParsedCertificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Error;
use super::tls::certificates;

/// A URI that begins so, among the alternative names, says of which slot's member the certificate is.
const SLOT_URI: &str = "quorate:slot:";

/// The name by which a certificate is for the member of a slot alone, whatever hosts it is for.
pub fn slot_uri(slot: u16) -> String {
    format!("{SLOT_URI}{slot}")
}

/// A certificate that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    der: CertificateDer<'static>,
    /// The subject's common name, the first if there are several.
    pub common_name: Option<String>,
    /// The first DNS name or URI among its alternative names.
    pub san: Option<String>,
    /// All alternative names that are DNS names, URIs or addresses.
    sans: Vec<String>,
}

impl Certificate {
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, Error> {
        let unreadable = |error: &dyn std::fmt::Display| Error::new(format!("a certificate cannot be read: {error}"));
        let (_, read) = X509Certificate::from_der(der).map_err(|error| unreadable(&error))?;
        let common_name = read.subject().iter_common_name().find_map(|name| name.as_str().ok()).map(str::to_owned);
        let names = read.subject_alternative_name().map_err(|error| unreadable(&error))?;
        let mut sans = Vec::new();
        let mut san = None;
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) => {
                    san.get_or_insert_with(|| (*name).to_owned());
                    sans.push((*name).to_owned());
                }
                GeneralName::IPAddress(bytes) => sans.extend(address(bytes).map(|address| address.to_string())),
                _ => {}
            }
        }
        Ok(Self { der: der.clone().into_owned(), common_name, san, sans })
    }

    /// Whether it is for this host: a name, which a wildcard may stand for, or an address. The common name says nothing.
    pub fn is_for(&self, host: &str) -> bool {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let Ok(name) = ServerName::try_from(host) else { return false };
        ParsedCertificate::try_from(&self.der).is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
    }

    /// Whether it may be the member's of this slot: it names no slot, or this one.
    pub fn is_for_slot(&self, slot: u16) -> bool {
        let mut named = self.sans.iter().filter_map(|name| name.strip_prefix(SLOT_URI)).peekable();
        let slot = slot.to_string();
        named.peek().is_none() || named.any(|named| named == slot)
    }

    /// Whether it has this name, in whatever place.
    pub fn has_name(&self, name: &str) -> bool {
        self.names().any(|own| own == name) || self.is_for(name)
    }

    /// The common name, then all alternative names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.common_name.iter().chain(&self.sans).map(String::as_str)
    }
}

/// What a person asks of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub subject: String,
    pub issuer: String,
    /// The alternative names.
    pub names: Vec<String>,
    pub is_ca: bool,
    /// `server`, `client`; none: it may be used for both.
    pub uses: Vec<&'static str>,
    /// In seconds since 1970.
    pub begin: i64,
    pub end: i64,
    /// In hexadecimal.
    pub serial: String,
}

/// The certificates of a PEM file.
pub fn describe(pem: &[u8]) -> Result<Vec<Description>, Error> {
    certificates("the file", pem)?.iter().map(describe_one).collect()
}

fn describe_one(der: &CertificateDer<'_>) -> Result<Description, Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::new(format!("a certificate cannot be read: {error}"));
    let (_, read) = X509Certificate::from_der(der).map_err(|error| unreadable(&error))?;
    let usage = read.extended_key_usage().map_err(|error| unreadable(&error))?;
    let uses = usage.iter().flat_map(|usage| {
        [("server", usage.value.server_auth), ("client", usage.value.client_auth)].into_iter().filter(|(_, is)| *is)
    });
    Ok(Description {
        subject: read.subject().to_string(),
        issuer: read.issuer().to_string(),
        names: Certificate::read(der)?.sans,
        is_ca: read.is_ca(),
        uses: uses.map(|(name, _)| name).collect(),
        begin: read.validity().not_before.timestamp(),
        end: read.validity().not_after.timestamp(),
        serial: read.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok();
    v4.or_else(|| <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok())
}

/// The certificate that the other end of a connection has shown. Empty until the handshake is over, and for who has shown none; cloning
/// shares it.
#[derive(Clone, Debug, Default)]
pub struct Presented(Arc<OnceLock<Certificate>>);

impl Presented {
    pub fn get(&self) -> Option<&Certificate> {
        self.0.get()
    }

    pub(super) fn set(&self, certificate: Certificate) {
        // A connection has one handshake.
        let _ = self.0.set(certificate);
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn made(common_name: Option<&str>, sans: Vec<SanType>) -> Certificate {
        let mut params = CertificateParams::default();
        params.distinguished_name.remove(DnType::CommonName);
        if let Some(name) = common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.subject_alt_names = sans;
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Certificate::read(made.der()).unwrap()
    }

    #[test]
    fn names_are_read_in_their_order() {
        let sans = vec![
            SanType::IpAddress([10, 0, 0, 1].into()),
            SanType::URI("spiffe://x/kv".try_into().unwrap()),
            SanType::DnsName("kv.example".try_into().unwrap()),
        ];
        let certificate = made(Some("alice"), sans);
        assert_eq!(
            (certificate.common_name.as_deref(), certificate.san.as_deref()),
            (Some("alice"), Some("spiffe://x/kv"))
        );
        assert_eq!(certificate.names().collect::<Vec<_>>(), ["alice", "10.0.0.1", "spiffe://x/kv", "kv.example"]);
        let nameless = made(None, Vec::new());
        assert_eq!((&nameless.common_name, &nameless.san, nameless.names().count()), (&None, &None, 0));
    }

    #[test]
    fn a_certificate_that_names_a_slot_is_for_no_other() {
        let uri = |text: String| SanType::URI(text.try_into().unwrap());
        let (one, none) = (made(None, vec![uri(slot_uri(1))]), made(None, vec![uri("spiffe://x/1".into())]));
        assert!(one.is_for_slot(1) && !one.is_for_slot(0) && !one.is_for_slot(11));
        assert!(none.is_for_slot(0) && none.is_for_slot(1));
        let both = made(None, vec![uri(slot_uri(1)), uri(slot_uri(2))]);
        assert!(both.is_for_slot(1) && both.is_for_slot(2) && !both.is_for_slot(3));
    }

    #[test]
    fn a_host_is_an_alternative_name_or_what_a_wildcard_stands_for() {
        let sans = vec![
            SanType::IpAddress([10, 0, 0, 1].into()),
            SanType::IpAddress("::1".parse().unwrap()),
            SanType::DnsName("*.kv-headless.ns.svc".try_into().unwrap()),
        ];
        let certificate = made(Some("kv.example"), sans);
        for host in ["10.0.0.1", "[::1]", "::1", "kv-0.kv-headless.ns.svc"] {
            assert!(certificate.is_for(host) && certificate.has_name(host), "{host}");
        }
        for host in ["10.0.0.2", "kv-headless.ns.svc", "a.kv-0.kv-headless.ns.svc", "", "*", "kv.example"] {
            assert!(!certificate.is_for(host), "{host}");
        }
        assert!(certificate.has_name("kv.example"), "a common name is a name, though no host");
    }
}
