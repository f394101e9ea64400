//! JSON Web Tokens (RFC 7519): signatures, and the keys that they are checked with (RFC 7517).
//!
//! Owns which algorithm goes with which key: it follows from the key's kind, and what the token says must be one of those. So no token can
//! have a public key be taken for a secret, and `none` goes with no key. The signature is ring's work; the crates that do all of this bring
//! another library of cryptography beside ring.
//! Invariants: what is not signed by a key that is known is not looked at further; nothing here takes long, whatever it is given.
//! Absent: what the claims must be (the parent), encrypted tokens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::signature::{self, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio_rustls::rustls::pki_types::SubjectPublicKeyInfoDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Keys of one issuer; more are not taken.
const KEYS_MAX: usize = 128;
/// The shortest secret of a signature with one.
const SECRET_BYTES_MIN: usize = 32;

/// What a signature is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Rs(Hash),
    Ps(Hash),
    Es256,
    Es384,
    EdDsa,
    Hs(Hash),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Algorithm {
    /// By its name in a token's head; `None` for what is not taken, `none` above all.
    fn named(name: &str) -> Option<Self> {
        let hash = match name.get(2..)? {
            "256" => Hash::Sha256,
            "384" => Hash::Sha384,
            "512" => Hash::Sha512,
            _ => return (name == "EdDSA").then_some(Self::EdDsa),
        };
        match (&name[..2], hash) {
            ("RS", _) => Some(Self::Rs(hash)),
            ("PS", _) => Some(Self::Ps(hash)),
            ("HS", _) => Some(Self::Hs(hash)),
            ("ES", Hash::Sha256) => Some(Self::Es256),
            ("ES", Hash::Sha384) => Some(Self::Es384),
            _ => None,
        }
    }
}

enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

struct Key {
    id: Option<String>,
    /// The only one that it is for, if the issuer says so.
    algorithm: Option<Algorithm>,
    material: Material,
}

impl Key {
    /// Whether it is for signatures by `algorithm`: its kind decides.
    fn is_for(&self, algorithm: Algorithm) -> bool {
        let fits = match self.material {
            Material::Rsa { .. } => matches!(algorithm, Algorithm::Rs(_) | Algorithm::Ps(_)),
            Material::P256(_) => algorithm == Algorithm::Es256,
            Material::P384(_) => algorithm == Algorithm::Es384,
            Material::Ed25519(_) => algorithm == Algorithm::EdDsa,
            Material::Secret(_) => matches!(algorithm, Algorithm::Hs(_)),
        };
        fits && self.algorithm.is_none_or(|only| only == algorithm)
    }

    fn verify(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        let public = |by: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(by, key).verify(signed, signature).is_ok()
        };
        match &self.material {
            Material::Rsa { n, e } => rsa(algorithm).is_some_and(|by| {
                RsaPublicKeyComponents { n: &n[..], e: &e[..] }.verify(by, signed, signature).is_ok()
            }),
            Material::P256(point) => public(&signature::ECDSA_P256_SHA256_FIXED, point),
            Material::P384(point) => public(&signature::ECDSA_P384_SHA384_FIXED, point),
            Material::Ed25519(point) => public(&signature::ED25519, point),
            Material::Secret(secret) => {
                let by = match algorithm {
                    Algorithm::Hs(Hash::Sha256) => hmac::HMAC_SHA256,
                    Algorithm::Hs(Hash::Sha384) => hmac::HMAC_SHA384,
                    Algorithm::Hs(Hash::Sha512) => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(by, secret), signed, signature).is_ok()
            }
        }
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    match algorithm {
        Algorithm::Rs(Hash::Sha256) => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
        Algorithm::Rs(Hash::Sha384) => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
        Algorithm::Rs(Hash::Sha512) => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
        Algorithm::Ps(Hash::Sha256) => Some(&signature::RSA_PSS_2048_8192_SHA256),
        Algorithm::Ps(Hash::Sha384) => Some(&signature::RSA_PSS_2048_8192_SHA384),
        Algorithm::Ps(Hash::Sha512) => Some(&signature::RSA_PSS_2048_8192_SHA512),
        Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa | Algorithm::Hs(_) => None,
    }
}

/// Why a token is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is none, or says that it is signed in a way that nothing is.
    Malformed,
    /// It names a key that is not known: the issuer may have a new one.
    UnknownKey,
    /// No key that it may be signed with has signed it.
    Signature,
}

/// An issuer's keys.
#[derive(Default)]
pub(super) struct Keys(Vec<Key>);

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

/// As RFC 7517 and 7518 have it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: String,
    n: String,
    e: String,
    x: String,
    y: String,
    k: String,
}

#[derive(Deserialize)]
struct Head {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl Keys {
    /// A key set that an issuer has published; secrets in it are none any more, and not taken.
    pub(super) fn published(bytes: &[u8]) -> Result<Self, String> {
        let mut keys = Self::set(bytes)?;
        keys.0.retain(|key| !matches!(key.material, Material::Secret(_)));
        keys.some("no public key is in the set that this build can use")
    }

    /// A key set, secrets among them, or public keys in PEM, as an operator keeps them in a file.
    pub(super) fn of_file(bytes: &[u8]) -> Result<Self, String> {
        let is_pem = bytes.windows(10).any(|window| window == b"-----BEGIN");
        let keys = if is_pem { Self::pem(bytes)? } else { Self::set(bytes)? };
        keys.some("no key is in it that this build can use, expected a JSON Web Key Set or PEM (BEGIN PUBLIC KEY)")
    }

    fn some(self, otherwise: &str) -> Result<Self, String> {
        match self.0.len() {
            0 => Err(otherwise.to_owned()),
            1..=KEYS_MAX => Ok(self),
            more => Err(format!("{more} keys, expected at most {KEYS_MAX}")),
        }
    }

    /// What is of no use here is left out, as the RFC asks.
    fn set(bytes: &[u8]) -> Result<Self, String> {
        let set: KeySet = serde_json::from_slice(bytes).map_err(|error| format!("no JSON Web Key Set: {error}"))?;
        Ok(Self(set.keys.into_iter().filter_map(|key| Key::read(serde_json::from_value(key).ok()?)).collect()))
    }

    fn pem(bytes: &[u8]) -> Result<Self, String> {
        let read = |der: SubjectPublicKeyInfoDer<'_>| {
            let (_, info) = SubjectPublicKeyInfo::from_der(der.as_ref()).ok()?;
            let curve = |point: &[u8]| match point.len() {
                65 => Some(Material::P256(point.to_vec())),
                97 => Some(Material::P384(point.to_vec())),
                _ => None,
            };
            let material = match info.parsed().ok()? {
                PublicKey::RSA(key) => Material::Rsa { n: stripped(key.modulus), e: stripped(key.exponent) },
                PublicKey::EC(point) => curve(point.data())?,
                // RFC 8410.
                PublicKey::Unknown(key) if info.algorithm.algorithm.to_id_string() == "1.3.101.112" => {
                    Material::Ed25519(key.to_vec())
                }
                _ => return None,
            };
            Some(Key { id: None, algorithm: None, material })
        };
        let all: Result<Vec<_>, _> = SubjectPublicKeyInfoDer::pem_slice_iter(bytes).collect();
        let all = all.map_err(|error| format!("{error}; expected public keys in PEM"))?;
        Ok(Self(all.into_iter().filter_map(read).collect()))
    }

    /// The claims of a token that one of these keys has signed.
    pub(super) fn claims(&self, token: &str) -> Result<Map<String, Value>, Refused> {
        let (signed, signature) = token.rsplit_once('.').ok_or(Refused::Malformed)?;
        let (head, claims) = signed.split_once('.').ok_or(Refused::Malformed)?;
        let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Refused::Malformed);
        let head: Head = serde_json::from_slice(&decoded(head)?).map_err(|_| Refused::Malformed)?;
        // Something that whoever does not know it must not pass over.
        if head.crit.is_some() {
            return Err(Refused::Malformed);
        }
        let algorithm = Algorithm::named(&head.alg).ok_or(Refused::Malformed)?;
        let signature = decoded(signature)?;
        let mut known = false;
        // Without a name any may be the one.
        let named = |key: &&Key| match (&key.id, &head.kid) {
            (Some(id), Some(wanted)) => id == wanted,
            _ => true,
        };
        let is_signed = self.0.iter().filter(named).any(|key| {
            known = true;
            key.is_for(algorithm) && key.verify(algorithm, signed.as_bytes(), &signature)
        });
        match (is_signed, known) {
            (true, _) => serde_json::from_slice(&decoded(claims)?).map_err(|_| Refused::Malformed),
            (false, true) => Err(Refused::Signature),
            (false, false) => Err(Refused::UnknownKey),
        }
    }
}

impl Key {
    fn read(jwk: Jwk) -> Option<Self> {
        if jwk.usage.is_some_and(|usage| usage != "sig") {
            return None;
        }
        let algorithm = match jwk.alg {
            Some(name) => Some(Algorithm::named(&name)?),
            None => None,
        };
        let part = |text: &str| URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok().filter(|part| !part.is_empty());
        // The form of a point that is not compressed (SEC 1, 2.3.3).
        let point = |bytes: usize| {
            let (x, y) = (part(&jwk.x)?, part(&jwk.y)?);
            (x.len() == bytes && y.len() == bytes).then(|| [&[4], &x[..], &y[..]].concat())
        };
        let material = match (&jwk.kty[..], &jwk.crv[..]) {
            ("RSA", _) => Material::Rsa { n: stripped(&part(&jwk.n)?), e: stripped(&part(&jwk.e)?) },
            ("EC", "P-256") => Material::P256(point(32)?),
            ("EC", "P-384") => Material::P384(point(48)?),
            ("OKP", "Ed25519") => Material::Ed25519(part(&jwk.x)?),
            ("oct", _) => Material::Secret(part(&jwk.k).filter(|secret| secret.len() >= SECRET_BYTES_MIN)?),
            _ => return None,
        };
        Some(Self { id: jwk.kid, algorithm, material })
    }
}

/// A number without zeros before it, as ring wants them.
fn stripped(number: &[u8]) -> Vec<u8> {
    let first = number.iter().position(|byte| *byte != 0).unwrap_or(number.len());
    number[first..].to_vec()
}

#[cfg(test)]
pub(super) mod tests;
