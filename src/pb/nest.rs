//! Transactions, the only messages that hold themselves: how deep they may nest, and how they are decoded.
//!
//! prost refuses a message nested deeper than 100, counted from the outermost one. A request that is just within that is beyond it in the
//! batch that carries it into the log, and its answer is in the message to another member: committed, but never to be applied. So each
//! transaction begins prost's count anew, and transactions are counted by themselves, against [`TXN_DEPTH_MAX`].
//! Invariants: a transaction that decodes by itself decodes in every envelope, and so does its answer; whatever the bytes are, decoding takes
//! bounded stack. It holds at every door, for there is no other decoder. The same at all of them, so it is no setting: what a
//! setting allows is less, and is looked at before a request is proposed (`kv::validate`).

use std::cell::Cell;

use bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType, message, skip_field};
use prost::{DecodeError, Message};

use super::etcd::{Compare, RequestOp, ResponseHeader, ResponseOp};

/// Transactions within one another that can be decoded. All that is recursive (decoding, encoding, copying, dropping, checking, applying) is
/// tested at this depth on a thread of 2 MiB, without optimization.
pub const TXN_DEPTH_MAX: usize = 512;

/// `etcdserverpb.TxnRequest`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TxnRequest {
    pub compare: Vec<Compare>,
    pub success: Vec<RequestOp>,
    pub failure: Vec<RequestOp>,
}

/// `etcdserverpb.TxnResponse`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TxnResponse {
    pub header: Option<ResponseHeader>,
    pub succeeded: bool,
    pub responses: Vec<ResponseOp>,
}

thread_local! {
    /// Transactions that are being decoded on this thread, each in the one before: prost's context has no place for a count of ours.
    static AROUND: Cell<usize> = const { Cell::new(0) };
}

/// One more transaction around what is decoded while this lives.
struct Around;

impl Around {
    fn enter() -> Result<Self, DecodeError> {
        let around = AROUND.get();
        if around >= TXN_DEPTH_MAX {
            return Err(too_deep());
        }
        AROUND.set(around + 1);
        Ok(Self)
    }
}

impl Drop for Around {
    fn drop(&mut self) {
        AROUND.set(AROUND.get() - 1);
    }
}

/// prost's own "recursion limit reached", which has no public constructor.
fn too_deep() -> DecodeError {
    const GROUP_BEGINS: [u8; 128] = [0x0b; 128];
    let skipped = skip_field(WireType::StartGroup, 1, &mut &GROUP_BEGINS[..], DecodeContext::default());
    skipped.expect_err("groups nest deeper than prost allows")
}

impl Message for TxnRequest {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        message::encode_repeated(1, &self.compare, buf);
        message::encode_repeated(2, &self.success, buf);
        message::encode_repeated(3, &self.failure, buf);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let _around = Around::enter()?;
        let anew = DecodeContext::default();
        match tag {
            1 => message::merge_repeated(wire_type, &mut self.compare, buf, anew),
            2 => message::merge_repeated(wire_type, &mut self.success, buf, anew),
            3 => message::merge_repeated(wire_type, &mut self.failure, buf, anew),
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        message::encoded_len_repeated(1, &self.compare)
            + message::encoded_len_repeated(2, &self.success)
            + message::encoded_len_repeated(3, &self.failure)
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Message for TxnResponse {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if let Some(header) = &self.header {
            message::encode(1, header, buf);
        }
        if self.succeeded {
            encoding::bool::encode(2, &self.succeeded, buf);
        }
        message::encode_repeated(3, &self.responses, buf);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let _around = Around::enter()?;
        let anew = DecodeContext::default();
        match tag {
            1 => message::merge(wire_type, self.header.get_or_insert_default(), buf, anew),
            2 => encoding::bool::merge(wire_type, &mut self.succeeded, buf, anew),
            3 => message::merge_repeated(wire_type, &mut self.responses, buf, anew),
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        self.header.as_ref().map_or(0, |header| message::encoded_len(1, header))
            + if self.succeeded { encoding::bool::encoded_len(2, &self.succeeded) } else { 0 }
            + message::encoded_len_repeated(3, &self.responses)
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}
