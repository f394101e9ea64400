//! The header of an answer, as far as the state knows it: the revision.
//!
//! Absent: the ids of cluster and member and the term, which the member that answers fills in (`api`).

use crate::pb::etcd::ResponseHeader;

pub(super) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}
