//! Tokens and keys of the test's own, and attacks on them.

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use serde_json::json;

use super::*;

pub fn encoded(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Somebody who signs tokens with a key of the curve P-256.
pub struct Signer {
    pub id: String,
    pair: EcdsaKeyPair,
}

impl Signer {
    pub fn new(id: &str) -> Self {
        let (by, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(by, &random).unwrap();
        Self { id: id.into(), pair: EcdsaKeyPair::from_pkcs8(by, document.as_ref(), &random).unwrap() }
    }

    fn point(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    pub fn jwk(&self) -> Value {
        let (x, y) = (encoded(&self.point()[1..33]), encoded(&self.point()[33..]));
        json!({ "kty": "EC", "crv": "P-256", "kid": self.id, "use": "sig", "alg": "ES256", "x": x, "y": y })
    }

    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({ "alg": "ES256", "kid": self.id }), claims)
    }

    pub fn token_with(&self, head: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encoded(head.to_string().as_bytes()), encoded(claims.to_string().as_bytes()));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", encoded(signature.as_ref()))
    }
}

pub fn set(signers: &[&Signer]) -> Vec<u8> {
    json!({ "keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>() }).to_string().into_bytes()
}

fn unsigned(head: &Value, claims: &Value) -> String {
    format!("{}.{}", encoded(head.to_string().as_bytes()), encoded(claims.to_string().as_bytes()))
}

#[test]
fn what_a_known_key_has_signed_is_taken_and_nothing_else() {
    let (one, other) = (Signer::new("1"), Signer::new("2"));
    let claims = json!({ "sub": "u" });
    let keys = Keys::published(&set(&[&one])).unwrap();
    let token = one.token(&claims);
    assert_eq!(keys.claims(&token).map(Value::Object), Ok(claims.clone()));
    // Without the name of a key, too.
    assert!(keys.claims(&one.token_with(&json!({ "alg": "ES256" }), &claims)).is_ok());
    assert_eq!(keys.claims(&other.token(&claims)), Err(Refused::UnknownKey));
    let posing = other.token_with(&json!({ "alg": "ES256", "kid": "1" }), &claims);
    assert_eq!(keys.claims(&posing), Err(Refused::Signature));
    for at in 0..token.len() {
        let mut forged = token.clone().into_bytes();
        forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
        let forged = String::from_utf8(forged).unwrap();
        // The last character of a part has bits that mean nothing, and then must be zero.
        assert!(keys.claims(&forged).is_err(), "character {at}");
        assert!(keys.claims(&token[..at]).is_err(), "cut at {at}");
    }
    for head in [json!({ "alg": "ES256", "crit": ["exp"] }), json!({ "alg": "ES256", "kid": 7 }), json!({}), json!(1)] {
        assert_eq!(keys.claims(&one.token_with(&head, &claims)), Err(Refused::Malformed), "{head}");
    }
    for none in ["", ".", "..", "a.b", "a.b.c.d", "💥.💥.💥"] {
        assert_eq!(keys.claims(none), Err(Refused::Malformed), "{none}");
    }
}

#[test]
fn a_token_without_a_signature_or_one_made_with_the_public_key_is_none() {
    let one = Signer::new("1");
    let (claims, jwk) = (json!({ "sub": "root" }), one.jwk());
    let keys = Keys::published(&set(&[&one])).unwrap();
    for alg in ["none", "None", "NONE", "nOnE", "", "ES512", "RS1", "HS1", "E"] {
        let text = unsigned(&json!({ "alg": alg, "kid": "1" }), &claims);
        for signature in ["", "AA"] {
            assert_eq!(keys.claims(&format!("{text}.{signature}")), Err(Refused::Malformed), "{alg}");
        }
    }
    // Key confusion: whoever knows the public key, that is everybody, takes it for a secret, in whatever form.
    let point = one.point();
    for secret in [point, &point[1..], &point[1..33], jwk.to_string().as_bytes(), jwk["x"].as_str().unwrap().as_bytes()]
    {
        for (alg, by) in [("HS256", hmac::HMAC_SHA256), ("HS384", hmac::HMAC_SHA384), ("HS512", hmac::HMAC_SHA512)] {
            let text = unsigned(&json!({ "alg": alg, "kid": "1" }), &claims);
            let tag = hmac::sign(&hmac::Key::new(by, secret), text.as_bytes());
            assert_eq!(keys.claims(&format!("{text}.{}", encoded(tag.as_ref()))), Err(Refused::Signature), "{alg}");
        }
    }
    // A signature that is right, with another algorithm's name.
    for alg in ["RS256", "PS256", "EdDSA", "HS256", "ES384"] {
        let told = keys.claims(&one.token_with(&json!({ "alg": alg, "kid": "1" }), &claims));
        assert_eq!(told, Err(Refused::Signature), "{alg}");
    }
}

#[test]
fn secrets_count_from_a_file_alone_and_other_keys_are_read_from_pem() {
    let (secret, claims) = ([7_u8; 32], json!({ "sub": "u" }));
    let set = |k: &[u8]| json!({ "keys": [{ "kty": "oct", "k": encoded(k) }] }).to_string().into_bytes();
    let text = unsigned(&json!({ "alg": "HS256" }), &claims);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), text.as_bytes());
    let token = format!("{text}.{}", encoded(tag.as_ref()));
    assert!(Keys::of_file(&set(&secret)).unwrap().claims(&token).is_ok());
    assert!(Keys::published(&set(&secret)).is_err(), "it is known to everybody");
    assert!(Keys::of_file(&set(&secret[..16])).is_err(), "it can be guessed");
    // Public keys of all kinds in PEM, with tokens that only openssl's would be: here what ring signs.
    let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
    let ed = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let ec = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let pem = format!("{}{}", ed.public_key_pem(), ec.public_key_pem());
    let keys = Keys::of_file(pem.as_bytes()).unwrap();
    assert_eq!(keys.0.len(), 2);
    let sign = |alg: &str, sign: &dyn Fn(&[u8]) -> Vec<u8>| {
        let text = unsigned(&json!({ "alg": alg }), &claims);
        let signature = encoded(&sign(text.as_bytes()));
        format!("{text}.{signature}")
    };
    let own = Ed25519KeyPair::from_pkcs8_maybe_unchecked(ed.serialized_der()).unwrap();
    assert!(keys.claims(&sign("EdDSA", &|text| own.sign(text).as_ref().to_vec())).is_ok());
    assert_eq!(keys.claims(&sign("EdDSA", &|text| pair.sign(text).as_ref().to_vec())), Err(Refused::Signature));
    let (by, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
    let own = EcdsaKeyPair::from_pkcs8(by, ec.serialized_der(), &random).unwrap();
    assert!(keys.claims(&sign("ES256", &|text| own.sign(&random, text).unwrap().as_ref().to_vec())).is_ok());
    assert!(Keys::of_file(b"{}").is_err() && Keys::of_file(b"-----BEGIN").is_err() && Keys::of_file(b"").is_err());
}

/// Signed by openssl.
#[test]
fn tokens_that_another_program_has_signed_with_rsa_are_taken() {
    let modulus = "v_UTc5iVmK4xeUgDnQ8RXx-wPPFIK_kMUcHKMJQAFv51jLsKQK-phyKae9pYHCNH4fh7PQxonVORmHkhvxKXduC9iLFb6edQ\
                LDwvhMphPCS6klVaTKKaW4SyFD-7XDmjiYZnveNsy7G9F4MCFjZ9p-KoVbd4UZfigxA5GweqFG7hIbfSDOji6vAAxXP6iBEw\
                z8AK-yT3-JWOqTYJSO1izo6bfvm3AwqAYwA9nzfO9nUqOEls9gIoRIsEHQxX6jZEccebet6a_hLTmD8qAPqzHv_qtjOwA-R0\
                p4HV091UBm8C5P-2HkL57De-NC-_4rDZqEUi-RFiVU0dbDIm4V8U9Q";
    let pem = "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAv/UTc5iVmK4xeUgDnQ8R\nXx+wPPFIK/kMUcHKMJQAFv51jLsKQK+phyKae9pYHCNH4fh7PQxonVORmHkhvxKX\nduC9iLFb6edQLDwvhMphPCS6klVaTKKaW4SyFD+7XDmjiYZnveNsy7G9F4MCFjZ9\np+KoVbd4UZfigxA5GweqFG7hIbfSDOji6vAAxXP6iBEwz8AK+yT3+JWOqTYJSO1i\nzo6bfvm3AwqAYwA9nzfO9nUqOEls9gIoRIsEHQxX6jZEccebet6a/hLTmD8qAPqz\nHv/qtjOwA+R0p4HV091UBm8C5P+2HkL57De+NC+/4rDZqEUi+RFiVU0dbDIm4V8U\n9QIDAQAB\n-----END PUBLIC KEY-----\n";
    let set = json!({ "keys": [{ "kty": "RSA", "e": "AQAB", "n": modulus }] }).to_string();
    for token in [
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ1In0.vjLATiM8Y_sC2ow0sh0ruaNiXJylgZ3D8bEUbMki0qTlt4-7ARoRnpS-xPg\
                P6BnhJn_BvUdcX7pzTKvL_aP0j75B7ga_XG6AGJNCJx-Ki7HO6uqB3-59J9rBODqsfjNiQ-xxW4NdZhnsktPmB0Qx4HAbdg7\
                Jjc5gshw5yXYjQcg7i5pPN-QZ3yi8iCU9jRmMgu-imof-Vt1oCODYLgmLNZ62_29Lg7k4tZGm6ibjg7PsTIVWkUWGRY4w4Do\
                cgrcyY7A2W2KFWSJzcbfrLVHZQ3n3Dwek6ICUcbt73nRuIv-0dRZyUG5-5_kEQ31gT1J29fxO_3Ko5Xe_w1MjvOwf4A",
        "eyJhbGciOiJQUzI1NiJ9.eyJzdWIiOiJ1In0.YWwKtPk2ePZeC6eVoQQw7mP-V7lxUbdarS3bVXAiohgr48sgBLMkNHF0g-t\
                rj0D9twOKsmG9m9ahqjgepJXNCdigMrT9sdMdSxRmBpfkU3cJX5J1VMfcgTXNT75UpxtupZwPU6YGuQIEuAUsWzCFrbFOMzW\
                tyUFwkccAxd4RWIyKJKZdrEpoTpSHyhjTKcg8UnyUu5f-aKpocFxKAu5gUGsW0c_DDAQAhNiGDRrWUSc42tODMJaLoKV-joU\
                qVBmhBAZMV8FDm10m-VMQbkkvQiSCbgBofpZxZmx1kvK6X-TYbXJYHBksymEPRjxxsDgYpOeY9ZIKp__YGrwD_47TGA",
    ] {
        for keys in [Keys::published(set.as_bytes()).unwrap(), Keys::of_file(pem.as_bytes()).unwrap()] {
            assert_eq!(keys.claims(token).unwrap()["sub"], "u");
        }
        let only = set.replace("\"RSA\"", "\"RSA\",\"alg\":\"RS512\"");
        assert_eq!(Keys::published(only.as_bytes()).unwrap().claims(token), Err(Refused::Signature));
    }
}
