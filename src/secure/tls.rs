//! From the bytes of PEM files to what rustls takes.
//!
//! Owns which versions, suites and checks are used, on both ports and by our own clients: rustls with ring, and its safe defaults.
//! Invariant: nothing here reads a file or a clock, so what is made follows from the bytes alone. A revoked certificate is refused also
//! where the list has none of its CA's other certificates; who is on no list of his own CA is let in, since a bundle of two CAs may have
//! a list of one.
//! Absent: when files are read anew (`port`).

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    self, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme, SupportedCipherSuite, SupportedProtocolVersion, version,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Certificate, Error};
use crate::config::{ClientCert, TlsVersion};
use crate::env::net::Stream;

/// gRPC, and the gateway beside it.
const ALPN_SERVED: [&[u8]; 2] = [b"h2", b"http/1.1"];
const ALPN_DIALLED: &[u8] = b"h2";

/// The bytes of one port's files, as they were read together.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) certificate: Vec<u8>,
    pub(super) key: Vec<u8>,
    pub(super) ca: Vec<u8>,
    pub(super) crl: Vec<u8>,
}

/// What a port asks of those who connect.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) certificates: ClientCert,
    pub(super) allowed_names: Vec<String>,
    pub(super) min_version: TlsVersion,
    pub(super) cipher_suites: Vec<String>,
    /// The port's certificate is shown where this member dials, too.
    pub(super) dials: bool,
}

/// Files that fit together, made ready.
pub(super) struct Material {
    pub(super) server: Arc<ServerConfig>,
    pub(super) dialer: Option<Dialer>,
    /// When its own certificate ends, and the first of the CAs, in seconds since 1970.
    pub(super) end: i64,
    pub(super) ca_end: Option<i64>,
}

impl Material {
    pub(super) fn new(read: &Read, rules: &Rules) -> Result<Self, Error> {
        let chain = certificates("cert_file", &read.certificate)?;
        let key = private_key("key_file", &read.key)?;
        let provider = provider(&rules.cipher_suites)?;
        let cas = if read.ca.is_empty() { Vec::new() } else { certificates("ca_file", &read.ca)? };
        let trust = Trust { roots: Arc::new(roots("ca_file", &cas)?), lists: revocations(&read.crl)?, provider };
        let (end, ca_end) = (end_of(&chain[0])?, cas.iter().map(end_of).collect::<Result<Vec<_>, _>>()?);
        let dialer = match rules.dials {
            true => Some(Dialer::new(&trust, versions(rules.min_version), Some((chain.clone(), key.clone_key())))?),
            false => None,
        };
        let builder = ServerConfig::builder_with_provider(trust.provider.clone())
            .with_protocol_versions(versions(rules.min_version))
            .map_err(|error| {
                Error::new(format!("cipher_suites: {error}; expected suites of the versions that are spoken"))
            })?
            .with_client_cert_verifier(trust.verifier(rules)?);
        let mut server = builder.with_single_cert(chain, key).map_err(|error| {
            Error::new(format!(
                "cert_file and key_file do not fit together: {error}; expected a certificate and its own key"
            ))
        })?;
        server.alpn_protocols = ALPN_SERVED.map(<[u8]>::to_vec).into();
        Ok(Self { server: Arc::new(server), dialer, end, ca_end: ca_end.into_iter().min() })
    }
}

/// Whom certificates must come from.
struct Trust {
    roots: Arc<RootCertStore>,
    lists: Vec<CertificateRevocationListDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    /// Looks at the certificates of those who connect.
    fn verifier(&self, rules: &Rules) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        if rules.certificates == ClientCert::Off {
            return Ok(WebPkiClientVerifier::no_client_auth());
        }
        let builder = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .with_crls(self.lists.clone())
            .allow_unknown_revocation_status();
        let builder =
            if rules.certificates == ClientCert::Optional { builder.allow_unauthenticated() } else { builder };
        let inner = builder.build().map_err(|error| Error::new(format!("ca_file, crl_file: {error}")))?;
        if rules.allowed_names.is_empty() {
            return Ok(inner);
        }
        Ok(Arc::new(Named { inner, allowed: rules.allowed_names.clone() }))
    }
}

/// Dials with TLS, and shows a certificate if it has one. Cloning shares it.
#[derive(Clone)]
pub struct Dialer(TlsConnector);

impl Dialer {
    fn new(
        trust: &Trust,
        versions: &[&'static SupportedProtocolVersion],
        own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    ) -> Result<Self, Error> {
        let verifier = WebPkiServerVerifier::builder_with_provider(trust.roots.clone(), trust.provider.clone())
            .with_crls(trust.lists.clone())
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| Error::new(format!("the CA's certificates: {error}")))?;
        let builder = ClientConfig::builder_with_provider(trust.provider.clone())
            .with_protocol_versions(versions)
            .map_err(|error| Error::new(error.to_string()))?
            .with_webpki_verifier(verifier);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(|error| {
                Error::new(format!(
                    "certificate and key do not fit together: {error}; expected a certificate and its own key"
                ))
            })?,
        };
        config.alpn_protocols = vec![ALPN_DIALLED.to_vec()];
        Ok(Self(Arc::new(config).into()))
    }

    /// For a client: trusts the CAs in `ca`, in PEM, and shows certificate and key, if there are some.
    pub fn for_client(roots: RootCertStore, own: Option<(&[u8], &[u8])>) -> Result<Self, Error> {
        let own = match own {
            Some((certificate, key)) => {
                Some((certificates("the certificate", certificate)?, private_key("the key", key)?))
            }
            None => None,
        };
        let trust = Trust { roots: Arc::new(roots), lists: Vec::new(), provider: provider(&[])? };
        Self::new(&trust, versions(TlsVersion::V1_2), own)
    }

    /// For a client of HTTP/1.1: trusts these CAs.
    pub fn for_https(roots: RootCertStore) -> Result<Self, Error> {
        let trust = Trust { roots: Arc::new(roots), lists: Vec::new(), provider: provider(&[])? };
        let dialer = Self::new(&trust, versions(TlsVersion::V1_2), None)?;
        let mut config = ClientConfig::clone(dialer.0.config());
        config.alpn_protocols = Vec::new();
        Ok(Self(Arc::new(config).into()))
    }

    /// Makes a connection to `host`, a name or an address, one of TLS.
    pub async fn dial(&self, host: &str, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("{host:?}: {error}")))?;
        Ok(Box::new(self.0.connect(name, stream).await?))
    }
}

/// Whether a handshake failed because the other end speaks no TLS.
pub fn is_plain(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(cause) => matches!(cause, rustls::Error::InvalidMessage(_)),
        None => matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        ),
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

/// The CAs in a PEM file; `what` names it in errors.
pub fn roots_of(what: &str, pem: &[u8]) -> Result<RootCertStore, Error> {
    roots(what, &certificates(what, pem)?)
}

/// The CAs that this system trusts, from its files.
pub fn system_roots() -> Result<RootCertStore, Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    // Bundles of systems hold some that nobody can use.
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        return Err(Error::new("this system has no CA certificates; name a file with --cacert"));
    }
    Ok(store)
}

fn roots(what: &str, certificates: &[CertificateDer<'static>]) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store
            .add(certificate.clone())
            .map_err(|error| Error::new(format!("{what}: a certificate in it is no CA's: {error}")))?;
    }
    Ok(store)
}

pub(super) fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| Error::new(format!("{what}: {error}; expected certificates in PEM")))?;
    if all.is_empty() {
        return Err(Error::new(format!("{what}: no certificate is in it; expected one in PEM (BEGIN CERTIFICATE)")));
    }
    Ok(all)
}

pub(super) fn private_key(what: &str, pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| Error::new(format!("{what}: {error}; expected a private key in PEM, without a password")))
}

/// Lists in PEM, or one in DER, which is how most CAs publish theirs.
fn revocations(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    const BEGIN: &[u8] = b"-----BEGIN";
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    if !bytes.windows(BEGIN.len()).any(|window| window == BEGIN) {
        return Ok(vec![CertificateRevocationListDer::from(bytes.to_vec())]);
    }
    let all: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
    match all {
        Ok(lists) if !lists.is_empty() => Ok(lists),
        Ok(_) => Err(Error::new("crl_file: no list is in it; expected some in PEM (BEGIN X509 CRL)")),
        Err(error) => Err(Error::new(format!("crl_file: {error}; expected lists in PEM (BEGIN X509 CRL)"))),
    }
}

/// The last second of a certificate, since 1970.
fn end_of(certificate: &CertificateDer<'_>) -> Result<i64, Error> {
    let (_, read) = X509Certificate::from_der(certificate)
        .map_err(|error| Error::new(format!("a certificate cannot be read: {error}")))?;
    Ok(read.validity().not_after.timestamp())
}

fn suite_name(suite: &SupportedCipherSuite) -> String {
    format!("{:?}", suite.suite())
}

/// The cipher suites of TLS 1.2 that can be chosen from, by their standard names.
pub fn cipher_suites() -> Vec<String> {
    ring::ALL_CIPHER_SUITES.iter().filter(|suite| suite.tls13().is_none()).map(suite_name).collect()
}

/// With `suites` for TLS 1.2, or all.
fn provider(suites: &[String]) -> Result<Arc<CryptoProvider>, Error> {
    let mut provider = ring::default_provider();
    if suites.is_empty() {
        return Ok(Arc::new(provider));
    }
    let of_1_2 = cipher_suites();
    if let Some(unknown) = suites.iter().find(|suite| !of_1_2.contains(suite)) {
        return Err(Error::new(format!("cipher_suites: got {unknown:?}, expected some of {}", of_1_2.join(", "))));
    }
    provider.cipher_suites.retain(|suite| suite.tls13().is_some() || suites.contains(&suite_name(suite)));
    Ok(Arc::new(provider))
}

fn versions(least: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    static SPOKEN: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
    match least {
        TlsVersion::V1_2 => &SPOKEN,
        TlsVersion::V1_3 => &SPOKEN[..1],
    }
}

/// Lets in only certificates with one of some names.
#[derive(Debug)]
struct Named {
    inner: Arc<dyn ClientCertVerifier>,
    allowed: Vec<String>,
}

impl ClientCertVerifier for Named {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let certificate = Certificate::read(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        if self.allowed.iter().any(|name| certificate.has_name(name)) {
            return Ok(verified);
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
