//! The wire and log messages, generated from `proto/`, and those that are written by hand.
//!
//! Owns no rule: validation is in `kv`, mapping to and from Raft's types in `raft`.
//! Every `bytes` field is a `Bytes` that shares the buffer it was decoded from: whoever keeps one for long copies it.

pub mod checked;
pub mod codec;
pub(crate) mod key_value;
mod nest;
pub mod pieces;

pub use key_value::{Fields, KeyValue, delimited_len};
pub use nest::{TXN_DEPTH_MAX, TxnRequest, TxnResponse};

// The module tree has the shape of the proto packages, which the generated code expects.
#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");

    pub use crate::pb::nest::{TxnRequest, TxnResponse};
}

#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod authpb {
    tonic::include_proto!("authpb");
}

pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod quorate {
    pub mod admin {
        pub mod v1 {
            tonic::include_proto!("quorate.admin.v1");
        }
    }
    pub mod backup {
        pub mod v1 {
            tonic::include_proto!("quorate.backup.v1");
        }
    }
    pub mod log {
        pub mod v1 {
            tonic::include_proto!("quorate.log.v1");
        }
    }
    pub mod peer {
        pub mod v1 {
            tonic::include_proto!("quorate.peer.v1");
        }
    }
}

/// The etcd v3 API (`proto/rpc.proto`).
pub use etcdserverpb as etcd;
pub use mvccpb::{Event, event::EventType};
/// What people ask of the membership (`proto/admin.proto`).
pub use quorate::admin::v1 as admin;
/// What backups hold (`proto/backup.proto`).
pub use quorate::backup::v1 as backup;
/// What is replicated and stored (`proto/log.proto`).
pub use quorate::log::v1 as log;
/// Between members (`proto/peer.proto`).
pub use quorate::peer::v1 as peer;
/// The election service (`proto/election.proto`).
pub use v3electionpb as election;
/// The lock service (`proto/lock.proto`).
pub use v3lockpb as lock;

/// Compiled descriptors of the public API, for server reflection.
pub const PUBLIC_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/public.bin"));

/// Of everything, the members' own calls among it: so a test can go through all of them.
pub const ALL_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/all.bin"));

impl log::Node {
    /// Whether it was added, and the node itself has not come yet.
    pub fn is_awaited(&self) -> bool {
        self.reservation.is_some_and(|reservation| reservation.claimed_by == 0)
    }
}

impl log::Command {
    /// A command that nobody has asked for yet; who proposes it says who did (`origin`).
    pub fn new(needs: u32, request: impl Into<Option<log::command::Request>>) -> Self {
        Self { needs, request: request.into(), asker: None, origin: None }
    }
}
