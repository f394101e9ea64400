//! Random bytes that somebody may want proposed: commands of every kind, nested, wide, of other versions, cut, flipped, and none at all.
//!
//! Owns what they look like. Absent: what must become of them (`node/tests/way.rs`, the fuzz target `way`, the simulation's forwarder).

use bytes::Bytes;
use prost::Message as _;

use crate::pb::authpb::Permission;
use crate::pb::etcd::compare::TargetUnion;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{
    AlarmRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGrantPermissionRequest, AuthUserDeleteRequest,
    AuthUserGrantRoleRequest, CompactionRequest, Compare, DeleteRangeRequest, LeaseCheckpoint, LeaseGrantRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use crate::pb::log::auth_change::Change;
use crate::pb::log::{
    self, Asker, AuthChange, Batch, Command, Follow, LeaseRevoke, LogId, Origin, Promote, SetClusterVersion,
    SourceEntry, StartDigest, Supersede, UserPassword, WantedSize, command::Request, source_entry,
};

/// Numbers at which arithmetic goes wrong.
const EDGES: &[i64] = &[0, 1, -1, 2, 63, 127, 128, 65_535, 65_536, i32::MAX as i64, i64::MAX - 1, i64::MAX, i64::MIN];

/// Makes them from a source of random numbers.
pub struct Proposals<'r>(pub &'r mut dyn FnMut() -> u64);

impl Proposals<'_> {
    fn below(&mut self, bound: u64) -> u64 {
        (self.0)() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn number(&mut self) -> i64 {
        match self.below(3) {
            0 => self.below(10) as i64,
            1 => EDGES[self.below(EDGES.len() as u64) as usize],
            _ => (self.0)() as i64,
        }
    }

    /// A kind, mostly of those that there are.
    fn kind(&mut self, kinds: u64) -> i32 {
        if self.one_in(12) { self.number() as i32 } else { self.below(kinds) as i32 }
    }

    /// Below `hostile/`, so that nobody else's keys are meant, but for a delete to the end of all.
    fn key(&mut self) -> Bytes {
        match self.below(20) {
            0 => Bytes::new(),
            1 => vec![b'h'; self.below(2000) as usize + 1].into(),
            _ => format!("hostile/{}", self.below(8)).into(),
        }
    }

    fn end(&mut self) -> Bytes {
        match self.below(4) {
            0 => "hostile0".into(),
            1 => self.key(),
            _ => Bytes::new(),
        }
    }

    fn put(&mut self) -> PutRequest {
        let value = vec![b'v'; if self.one_in(10) { self.below(5000) } else { self.below(9) } as usize];
        PutRequest {
            key: self.key(),
            value: value.into(),
            lease: if self.one_in(4) { self.number() } else { 0 },
            prev_kv: self.one_in(2),
            ignore_value: self.one_in(8),
            ignore_lease: self.one_in(8),
        }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.one_in(2) }
    }

    fn range(&mut self) -> RangeRequest {
        RangeRequest {
            key: self.key(),
            range_end: self.end(),
            limit: self.number(),
            revision: if self.one_in(3) { self.number() } else { 0 },
            sort_order: self.kind(3),
            sort_target: self.kind(5),
            min_mod_revision: self.number(),
            ..RangeRequest::default()
        }
    }

    fn compare(&mut self) -> Compare {
        let operand = match self.below(6) {
            0 => None,
            1 => Some(TargetUnion::Version(self.number())),
            2 => Some(TargetUnion::CreateRevision(self.number())),
            3 => Some(TargetUnion::ModRevision(self.number())),
            4 => Some(TargetUnion::Value(self.key())),
            _ => Some(TargetUnion::Lease(self.number())),
        };
        Compare {
            result: self.kind(4),
            target: self.kind(5),
            key: self.key(),
            range_end: self.end(),
            target_union: operand,
        }
    }

    fn op(&mut self, depth: u64) -> RequestOp {
        let request = match self.below(if depth == 0 { 6 } else { 8 }) {
            0..2 => Some(Op::RequestPut(self.put())),
            2..4 => Some(Op::RequestRange(self.range())),
            4 => Some(Op::RequestDeleteRange(self.delete())),
            5 => Some(Op::RequestPut(self.put())).filter(|_| !self.one_in(6)),
            _ => Some(Op::RequestTxn(self.txn(depth - 1))),
        };
        RequestOp { request }
    }

    fn txn(&mut self, depth: u64) -> TxnRequest {
        let mut ops = |most: u64| (0..self.below(most)).map(|_| self.op(depth)).collect();
        let (success, failure) = (ops(5), ops(5));
        TxnRequest { compare: (0..self.below(3)).map(|_| self.compare()).collect(), success, failure }
    }

    /// One transaction in another, over and over; in either branch, with or without something beside it.
    fn deep(&mut self) -> TxnRequest {
        let depth = match self.below(4) {
            0 => self.below(60),
            1 => 30 + self.below(30),
            2 => 120 + self.below(20),
            _ => self.below(crate::pb::TXN_DEPTH_MAX as u64 + 100),
        };
        let mut nest = self.txn(0);
        for _ in 0..depth {
            let mut ops = vec![RequestOp { request: Some(Op::RequestTxn(nest)) }];
            if self.one_in(8) {
                ops.push(self.op(0));
            }
            nest = match self.below(3) {
                0 => TxnRequest { failure: ops, ..TxnRequest::default() },
                _ => TxnRequest { success: ops, ..TxnRequest::default() },
            };
        }
        nest
    }

    /// Many operations on three levels, each on a key of its own.
    fn wide(&mut self) -> TxnRequest {
        let widths = [1 + self.below(40), 1 + self.below(40), 1 + self.below(12)];
        TxnRequest { success: puts(&widths, &mut 0), ..TxnRequest::default() }
    }

    fn request(&mut self) -> Request {
        match self.below(16) {
            0 => Request::Put(self.put()),
            1 => Request::DeleteRange(self.delete()),
            2..5 => Request::Txn(self.txn(3)),
            5..7 => Request::Txn(self.deep()),
            7 if self.one_in(4) => Request::Txn(self.wide()),
            7 | 8 => Request::Compact(CompactionRequest { revision: self.number(), physical: false }),
            9 => Request::SetClusterVersion(SetClusterVersion { version: self.number() as u32 }),
            10 => Request::LeaseGrant(LeaseGrantRequest { ttl: self.number(), id: self.number() }),
            11 if self.one_in(2) => Request::LeaseRevoke(LeaseRevoke { id: self.number(), term: self.number() as u64 }),
            11 => {
                let one = |all: &mut Self| LeaseCheckpoint { id: all.number(), remaining_ttl: all.number() };
                let checkpoints = (0..self.below(50)).map(|_| one(self)).collect();
                Request::LeaseCheckpoint(log::LeaseCheckpoint { checkpoints, term: self.number() as u64 })
            }
            // Alarms that nobody may put on here: `NONE`, and kinds that do not exist.
            12 if self.one_in(2) => Request::Alarm(AlarmRequest {
                action: self.kind(3),
                member_id: self.number() as u64,
                alarm: if self.one_in(2) { 0 } else { 0x70 + self.below(9) as i32 },
            }),
            12 => Request::StartDigest(StartDigest {}),
            // Authentication stays off: nobody makes the user root.
            13 if self.one_in(2) => Request::Auth(AuthChange { change: self.change() }),
            // Clients write here, so there is nobody to promote.
            14 if self.one_in(2) => Request::Promote(Promote { jump: self.number() }),
            14 => Request::Follow(self.follow()),
            // Of slots that no member has, for nobody is to leave.
            _ => Request::WantedSize(WantedSize {
                start: (self.number() as u64) | 1 << 40,
                replicas: self.number() as u64,
            }),
        }
    }

    /// Entries of another cluster; nobody here follows one.
    fn follow(&mut self) -> Follow {
        let entries = (0..self.below(3)).map(|_| {
            let commands = vec![Command::new(self.below(4) as u32, Request::Put(self.put()))];
            let log_id = Some(LogId { term: self.number() as u64, index: self.number() as u64 });
            SourceEntry { log_id, payload: Some(source_entry::Payload::Batch(Batch { commands })) }
        });
        Follow { entries: entries.collect(), next_record: self.number() as u64, ..Follow::default() }
    }

    fn change(&mut self) -> Option<Change> {
        let user = |all: &mut Self| format!("u{}", all.below(3));
        let role = |all: &mut Self| format!("r{}", all.below(3));
        Some(match self.below(7) {
            0 => Change::UserAdd(UserPassword { user: user(self), hash: self.key(), no_password: self.one_in(2) }),
            1 => Change::UserDelete(AuthUserDeleteRequest { name: user(self) }),
            2 => Change::UserGrantRole(AuthUserGrantRoleRequest { user: user(self), role: role(self) }),
            3 => Change::RoleAdd(AuthRoleAddRequest { name: role(self) }),
            4 => Change::RoleDelete(AuthRoleDeleteRequest { role: role(self) }),
            5 => Change::RoleGrantPermission(AuthRoleGrantPermissionRequest {
                name: role(self),
                perm: Some(Permission { perm_type: self.kind(4), key: self.key(), range_end: self.end() }),
            }),
            _ => return None,
        })
    }

    /// Of a process that is not there; mostly none, as of an older member.
    fn origin(&mut self) -> Option<Origin> {
        self.one_in(8).then(|| Origin { process: (self.0)(), number: self.number() as u64 })
    }

    /// A command as a struct, of whatever version.
    pub fn command(&mut self) -> Command {
        let needs = if self.one_in(10) { self.number() as u32 } else { self.below(4) as u32 };
        let request = Some(self.request()).filter(|_| !self.one_in(30));
        let asker = self.one_in(4).then(|| Asker { user: "u".into(), since: self.number() as u64, ..Asker::default() });
        Command { needs, request, asker, origin: self.origin() }
    }

    /// Bytes that every leader must refuse, whatever its settings.
    pub fn refused(&mut self) -> Bytes {
        let own = |request| Command::new(1, request);
        match self.below(9) {
            // No field has wire type 7.
            0 => [vec![7], (0..self.below(99)).map(|_| (self.0)() as u8).collect()].concat(),
            1 => Command { needs: 50 + self.below(1000) as u32, ..own(Request::Put(self.put())) }.encode_to_vec(),
            2 => own(Request::SetClusterVersion(SetClusterVersion { version: 50 + self.below(1000) as u32 }))
                .encode_to_vec(),
            3 => Command { needs: 1, ..Command::default() }.encode_to_vec(),
            4 => own(Request::StartDigest(StartDigest {})).encode_to_vec(),
            6 => own(Request::Supersede(Supersede::default())).encode_to_vec(),
            7 => own(Request::Follow(self.follow())).encode_to_vec(),
            5 => {
                let far = WantedSize { start: self.below(9), replicas: u64::MAX - self.below(9) };
                own(Request::WantedSize(far)).encode_to_vec()
            }
            // Groups within one another, deeper than anybody follows.
            _ => [own(Request::Put(self.put())).encode_to_vec(), [0xf3, 0x01].repeat(200)].concat(),
        }
        .into()
    }

    /// Bytes that may be a command.
    pub fn bytes(&mut self) -> Bytes {
        let mut bytes = self.command().encode_to_vec();
        match self.below(10) {
            0 => {
                let len = self.below(bytes.len() as u64 + 1);
                bytes.truncate(len as usize);
            }
            1 if !bytes.is_empty() => {
                for _ in 0..=self.below(4) {
                    let at = self.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << self.below(8);
                }
            }
            2 => bytes.extend(self.command().encode_to_vec()),
            3 => bytes = (0..self.below(300)).map(|_| (self.0)() as u8).collect(),
            // A field that this build does not know: groups within one another, which end or do not.
            4 => {
                let groups = self.below(400) as usize;
                bytes.extend([0xf3_u8, 0x01].repeat(groups));
                if !self.one_in(4) {
                    bytes.extend([0xf4_u8, 0x01].repeat(groups));
                }
            }
            _ => {}
        }
        bytes.into()
    }
}

fn puts(widths: &[u64], next: &mut u64) -> Vec<RequestOp> {
    let one = |_| {
        let request = match widths {
            [_] | [] => {
                *next += 1;
                Op::RequestPut(PutRequest { key: format!("hostile/{next}").into(), ..PutRequest::default() })
            }
            [_, inner @ ..] => Op::RequestTxn(TxnRequest { success: puts(inner, next), ..TxnRequest::default() }),
        };
        RequestOp { request: Some(request) }
    };
    (0..widths.first().copied().unwrap_or(0)).map(one).collect()
}
