//! Makes certificates: CAs, and what a CA signs.
//!
//! Owns their form: ECDSA keys on P-256, a CA that signs leaves only, and leaves that are for what they are made for and nothing else. A CA
//! that is read may have any key that rustls can sign with. A leaf ends with its CA at the latest, and begins a little before it is made,
//! for clocks that are behind.
//! Absent: files; whoever asks for a certificate keeps it. Lists of what was taken back, which are the business of CAs that live long.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use tokio_rustls::rustls::SignatureScheme;
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::sign::SigningKey;
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

use super::tls::private_key;
use super::{Error, since_1970};

/// A certificate begins so long before it is made.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5 * 60);

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Made {
    pub certificate: String,
    pub key: String,
}

/// What a leaf is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Server,
    Client,
    /// Both, as between members.
    Peer,
}

/// Whom a leaf is for.
#[derive(Clone, Debug)]
pub struct Subject {
    pub common_name: String,
    /// Names and addresses at which it is reached.
    pub hosts: Vec<String>,
    pub uris: Vec<String>,
    pub usage: Use,
}

fn failed(error: rcgen::Error) -> Error {
    Error::new(format!("a certificate cannot be made: {error}"))
}

/// Parameters of a certificate for `life`, which ends at `end_max` at the latest.
fn params(common_name: &str, life: Duration, end_max: i64) -> Result<CertificateParams, Error> {
    let now = since_1970();
    let end = now.saturating_add_unsigned(life.as_secs()).min(end_max);
    let moment = |seconds: i64| {
        let time =
            ASN1Time::from_timestamp(seconds).map_err(|_| Error::new("it would end in a year that has no form"))?;
        Ok::<_, Error>(time.to_datetime())
    };
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) =
        (moment(now.saturating_sub_unsigned(CLOCKS_DIFFER.as_secs()))?, moment(end)?);
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

/// A new CA, signed by itself.
pub fn ca(common_name: &str, life: Duration) -> Result<Made, Error> {
    let mut params = params(common_name, life, i64::MAX)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(Made { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// A CA that signs.
pub struct Issuer {
    inner: rcgen::Issuer<'static, CaKey>,
    /// Its own certificate, if those who trust its root do not have it.
    between: String,
    end: i64,
}

impl Issuer {
    /// From a CA's certificate and its key, in PEM.
    pub fn read(certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        let der = CertificateDer::from_pem_slice(certificate)
            .map_err(|error| Error::new(format!("the CA's certificate: {error}; expected one in PEM")))?;
        let unreadable = |error: &dyn std::fmt::Display| Error::new(format!("the CA's certificate: {error}"));
        let (_, read) = X509Certificate::from_der(&der).map_err(|error| unreadable(&error))?;
        if !read.is_ca() {
            return Err(Error::new("the CA's certificate is none of a CA; expected one that may sign others"));
        }
        let key = CaKey::read(key, &read)?;
        let is_root = read.subject() == read.issuer();
        let between = if is_root { String::new() } else { String::from_utf8_lossy(certificate).into_owned() };
        let end = read.validity().not_after.timestamp();
        Ok(Self { inner: rcgen::Issuer::from_ca_cert_der(&der, key).map_err(failed)?, between, end })
    }

    /// A new key, and a certificate for it.
    pub fn leaf(&self, subject: &Subject, life: Duration) -> Result<Made, Error> {
        let mut params = params(&subject.common_name, life, self.end)?;
        let hosts = CertificateParams::new(subject.hosts.clone()).map_err(failed)?.subject_alt_names;
        let uris = subject.uris.iter().map(|uri| Ok(SanType::URI(uri.as_str().try_into()?)));
        let uris = uris.collect::<Result<Vec<_>, rcgen::Error>>().map_err(failed)?;
        params.subject_alt_names = [hosts, uris].concat();
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let (server, client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
        params.extended_key_usages = match subject.usage {
            Use::Server => vec![server],
            Use::Client => vec![client],
            Use::Peer => vec![server, client],
        };
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.inner).map_err(failed)?.pem();
        Ok(Made { certificate: certificate + &self.between, key: key.serialize_pem() })
    }
}

/// A CA's key of any kind that rustls signs with.
struct CaKey {
    key: Arc<dyn SigningKey>,
    scheme: SignatureScheme,
    algorithm: &'static rcgen::SignatureAlgorithm,
    public: Vec<u8>,
}

impl CaKey {
    fn read(pem: &[u8], certificate: &X509Certificate<'_>) -> Result<Self, Error> {
        const SCHEMES: [(SignatureScheme, &rcgen::SignatureAlgorithm); 4] = [
            (SignatureScheme::ECDSA_NISTP256_SHA256, &rcgen::PKCS_ECDSA_P256_SHA256),
            (SignatureScheme::ECDSA_NISTP384_SHA384, &rcgen::PKCS_ECDSA_P384_SHA384),
            (SignatureScheme::ED25519, &rcgen::PKCS_ED25519),
            (SignatureScheme::RSA_PKCS1_SHA256, &rcgen::PKCS_RSA_SHA256),
        ];
        let key = any_supported_type(&private_key("the CA's key", pem)?)
            .map_err(|error| Error::new(format!("the CA's key: {error}; expected one of ECDSA, Ed25519 or RSA")))?;
        if key.public_key().is_none_or(|public| public.as_ref() != certificate.public_key().raw) {
            return Err(Error::new(
                "the CA's key is not that of its certificate; expected the two that belong together",
            ));
        }
        let (scheme, algorithm) = SCHEMES
            .into_iter()
            .find(|(scheme, _)| key.choose_scheme(&[*scheme]).is_some())
            .ok_or_else(|| Error::new("the CA's key cannot sign; expected one of ECDSA, Ed25519 or RSA"))?;
        let public = certificate.public_key().subject_public_key.data.to_vec();
        Ok(Self { key, scheme, algorithm, public })
    }
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signer = self.key.choose_scheme(&[self.scheme]).ok_or(rcgen::Error::RemoteKeyError)?;
        signer.sign(message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

#[cfg(test)]
mod tests {
    use super::super::certificate::describe;
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn subject(usage: Use) -> Subject {
        Subject {
            common_name: "kv".into(),
            hosts: vec!["kv.example".into(), "127.0.0.1".into()],
            uris: vec!["spiffe://x/kv".into()],
            usage,
        }
    }

    #[test]
    fn a_leaf_is_for_its_use_and_ends_with_its_ca() {
        let made = ca("our CA", DAY).unwrap();
        let issuer = Issuer::read(made.certificate.as_bytes(), made.key.as_bytes()).unwrap();
        let root = describe(made.certificate.as_bytes()).unwrap().remove(0);
        assert!(root.is_ca && root.subject.contains("our CA"), "{root:?}");
        for (usage, expected) in
            [(Use::Server, vec!["server"]), (Use::Client, vec!["client"]), (Use::Peer, vec!["server", "client"])]
        {
            let leaf = issuer.leaf(&subject(usage), 100 * DAY).unwrap();
            let seen = describe(leaf.certificate.as_bytes()).unwrap().remove(0);
            assert_eq!((seen.uses.clone(), seen.is_ca, seen.end), (expected, false, root.end));
            assert_eq!(seen.names, ["kv.example", "127.0.0.1", "spiffe://x/kv"]);
            assert!(leaf.key.contains("PRIVATE KEY"));
        }
        let short = issuer.leaf(&subject(Use::Server), Duration::from_secs(60)).unwrap();
        let seen = describe(short.certificate.as_bytes()).unwrap().remove(0);
        assert!(seen.end < root.end && seen.begin < since_1970(), "{seen:?}");
    }

    #[test]
    fn a_ca_with_another_key_or_a_leaf_as_ca_is_refused() {
        let (one, other) = (ca("one", DAY).unwrap(), ca("other", DAY).unwrap());
        let refusal = |certificate: &str, key: &str| match Issuer::read(certificate.as_bytes(), key.as_bytes()) {
            Ok(_) => panic!("it is taken"),
            Err(error) => error.to_string(),
        };
        assert!(refusal(&one.certificate, &other.key).contains("not that of its certificate"));
        let issuer = Issuer::read(one.certificate.as_bytes(), one.key.as_bytes()).unwrap();
        let leaf = issuer.leaf(&subject(Use::Peer), DAY).unwrap();
        assert!(refusal(&leaf.certificate, &leaf.key).contains("none of a CA"));
        assert!(refusal("x", &one.key).contains("PEM") && refusal(&one.certificate, "x").contains("key"));
        let hostile = Subject { hosts: vec!["käse".into()], ..subject(Use::Server) };
        assert!(issuer.leaf(&hostile, DAY).is_err(), "a name that has no form is refused");
    }
}
