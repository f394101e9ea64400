//! The digest: a hash of every change that apply has made, one after the other, so that members can tell that they hold the same
//! without looking at what they hold.
//!
//! Each change is folded in as it is made, in a few nanoseconds; the value travels with the state (snapshots, the state store). A
//! step is a bijection of the value: once two members differ, the same changes never make them equal again.
//! Absent: what is wrong in memory and was never written anew (`State::hash_kv` looks at everything, on demand), and what is
//! done about a difference (`cluster::audit`).

use prost::Message as _;

use super::State;
use crate::pb::KeyValue;
use crate::pb::log::{self, Change, StartDigest};

/// How a digest is made. To be raised when anything of it changes, the encoding of a change included: digests of different
/// versions are not compared.
pub const DIGEST_VERSION: u32 = 1;

/// The hash so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest(u64);

impl Digest {
    pub(super) const START: Self = Self(0x51_75_6f_72_61_74_65_00);

    pub(super) fn version(&mut self, kv: &KeyValue) {
        let bytes = kv.as_encoded();
        self.fold(crc32c::crc32c(bytes), bytes.len());
    }

    /// Any other change: rare, and small.
    pub(super) fn change(&mut self, change: &Change) {
        let bytes = change.encode_to_vec();
        // Apart from a version of the same bytes.
        self.fold(!crc32c::crc32c(&bytes), bytes.len());
    }

    fn fold(&mut self, crc: u32, len: usize) {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mixed = self.0 ^ (u64::from(crc) | (len as u64) << 32);
        self.0 = mixed.wrapping_mul(ODD).rotate_left(29);
    }
}

impl State {
    /// The digest of all changes so far, of [`DIGEST_VERSION`]; `None` if it is not known.
    pub fn digest(&self) -> Option<u64> {
        self.journal.digest.map(|digest| digest.0)
    }

    /// As a state's meta holds it.
    pub fn digest_to_pb(&self) -> Option<log::Digest> {
        self.digest().map(|value| log::Digest { version: DIGEST_VERSION, value })
    }

    /// Goes on from the digest that a state's meta holds; one of another version is not known.
    pub fn set_digest(&mut self, digest: Option<&log::Digest>) {
        self.journal.digest = digest.filter(|d| d.version == DIGEST_VERSION).map(|d| Digest(d.value));
    }

    /// Begins the digest anew, which makes it known.
    pub(super) fn start_digest(&mut self) -> StartDigest {
        self.journal.digest = Some(Digest::START);
        StartDigest {}
    }
}
