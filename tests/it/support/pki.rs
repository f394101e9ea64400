//! Certificates of one test, made by the program under test, as a person makes them (`quorate cert`).

use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

use super::cluster::binary;
use super::tools;

/// A CA in a directory of its own, and what it has signed.
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    pub fn new(dir: &Path) -> Self {
        let pki = Self { dir: dir.to_owned() };
        pki.cert(&["ca", "--name", dir.file_name().unwrap().to_str().unwrap()]);
        pki
    }

    fn cert(&self, args: &[&str]) {
        tools::run(Command::new(binary()).arg("cert").args(args).arg("--dir").arg(&self.dir));
    }

    /// A server's, `<out>.crt` and `<out>.key`.
    pub fn server(&self, out: &str, hosts: &str) -> &Self {
        self.cert(&["server", hosts, "--out", out]);
        self
    }

    /// A member's.
    pub fn peer(&self, out: &str, hosts: &str) -> &Self {
        self.cert(&["server", hosts, "--peer", "--out", out]);
        self
    }

    /// The same, for so long.
    pub fn peer_for(&self, out: &str, hosts: &str, life: &str) -> &Self {
        self.cert(&["server", hosts, "--peer", "--out", out, "--life", life]);
        self
    }

    /// The same, of one slot's member.
    pub fn slot(&self, out: &str, hosts: &str, slot: u64) -> &Self {
        self.cert(&["server", hosts, "--peer", "--slot", &slot.to_string(), "--out", out]);
        self
    }

    pub fn client(&self, name: &str) -> &Self {
        self.cert(&["client", name]);
        self
    }

    pub fn path(&self, file: &str) -> String {
        self.dir.join(file).to_str().unwrap().to_owned()
    }

    /// The flags by which our client, and etcdctl, trust this CA.
    pub fn trusting(&self) -> Vec<String> {
        vec!["--cacert".into(), self.path("ca.crt")]
    }

    /// The flags by which they show what this CA has signed.
    pub fn showing(&self, name: &str) -> Vec<String> {
        let file = |end: &str| self.path(&format!("{name}.{end}"));
        vec!["--cert".into(), file("crt"), "--key".into(), file("key")]
    }
}

/// A CA of clients that takes certificates back: what it signs, and the list of what it has taken back, are in `dir`.
pub struct ListingCa {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
}

impl ListingCa {
    /// Has signed a certificate for each of `names`.
    pub fn new(dir: &Path, names: &[&str]) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "a CA with a list");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        std::fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        let ca = Self { issuer: Issuer::new(params, key), dir: dir.to_owned() };
        for (serial, name) in (1_u64..).zip(names) {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, *name);
            params.serial_number = Some(SerialNumber::from(serial));
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &ca.issuer).unwrap();
            std::fs::write(dir.join(format!("{name}.crt")), certificate.pem()).unwrap();
            std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        ca.take_back(&[]);
        ca
    }

    /// Writes the list, `ca.crl`: certificates by their number, the first being 1.
    pub fn take_back(&self, serials: &[u64]) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1 + serials.len() as u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        std::fs::write(self.dir.join("ca.crl"), list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
    }
}
