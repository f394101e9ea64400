//! Messages: clients' requests through validation and apply, members' messages, and the changes that make a state.

use prost::Message as _;

use crate::kv::{self, Loader, State, validate};
use crate::pb::etcd::{CompactionRequest, PutRequest, RangeRequest, TxnRequest, range_request};
use crate::pb::log::{Batch, Command, LogId, command};
use crate::pb::{KeyValue, log, peer};
use crate::raft::convert;
use crate::storage::state::change;

/// A state with a few keys, a deletion, and a compaction.
pub(super) fn small_state() -> State {
    let mut state = State::new();
    for command in small_commands() {
        let applied = state.apply(&command, false).expect("the command is known");
        applied.expect("the command can be applied");
    }
    state
}

/// The commands that make [`small_state`].
pub(super) fn small_commands() -> Vec<Command> {
    let put = |key: &str, value: &str| {
        let put = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..PutRequest::default() };
        command::Request::Put(put)
    };
    let delete = crate::pb::etcd::DeleteRangeRequest { key: "b".into(), ..Default::default() };
    let requests = [
        put("a", "1"),
        put("b", "2"),
        put("a", "3"),
        command::Request::DeleteRange(delete),
        put("b", "4"),
        put("c", "5"),
        command::Request::Compact(CompactionRequest { revision: 4, physical: false }),
        put("a", "6"),
    ];
    requests.into_iter().map(|r| Command::new(kv::CLUSTER_VERSION_MIN, r)).collect()
}

fn fingerprint(state: &State) -> (i64, i64, u32, u64, usize) {
    let hash = state.hash_kv(0).expect("the present can be hashed");
    (state.revision(), state.compacted(), hash.hash, state.bytes(), state.key_count())
}

/// The state that loading `state`'s changes gives.
fn reloaded(state: &State) -> State {
    let mut loader = Loader::new();
    for change in state.changes() {
        loader.load(change).expect("a state's own changes load");
    }
    loader.finish(state.revision()).expect("a state's own changes are complete")
}

/// A batch of commands as a client's requests become one: what validation lets through must be applied alike whether somebody
/// waits for the answer or not; a refusal changes nothing; and the state that comes out survives a snapshot.
pub(super) fn requests(data: &[u8]) {
    let Ok(batch) = Batch::decode(data) else { return };
    let limits = validate::Limits::default();
    let (mut state, mut silent) = (small_state(), small_state());
    for command in batch.commands.iter().take(64) {
        let again = Command::decode(&command.encode_to_vec()[..]).expect("an encoded command decodes");
        assert_eq!(&again, command, "a command survives its encoding");
        if validate::command(command, &limits).is_err() || State::check(command).is_err() {
            continue;
        }
        let before = fingerprint(&state);
        if let Some(command::Request::Txn(txn)) = &command.request
            && kv::is_read_only(txn)
        {
            let _ = state.read_txn(txn);
            assert_eq!(fingerprint(&state), before, "a read changes nothing");
        }
        let outcome = state.apply(command, true).expect("a command that was checked is known");
        if outcome.is_err() {
            assert_eq!(fingerprint(&state), before, "a refusal changes nothing");
        }
        let unheard = silent.apply(command, false).expect("a command that was checked is known");
        assert_eq!(outcome.as_ref().err(), unheard.as_ref().err(), "who waits makes no difference");
    }
    let end = fingerprint(&state);
    assert_eq!(end, fingerprint(&silent), "members would differ by who has the client");
    let hash = |state: &State| state.hash_kv(0).expect("the present can be hashed");
    assert_eq!(hash(&state), hash(&reloaded(&state)), "a snapshot holds what the state does");
    while !silent.sweep(3) {}
    assert_eq!(hash(&state), hash(&silent), "sweeping is invisible");
}

/// Reads: the answer is within the interval and the limit, and equal when it is asked again after a sweep.
pub(super) fn range(data: &[u8]) {
    let mut state = small_state();
    if let Ok(range) = RangeRequest::decode(data)
        && validate::range(&range).is_ok()
        && let Ok(answer) = state.range(&range)
    {
        assert!(answer.kvs.len() as i64 <= answer.count, "no more keys than are counted");
        assert!(range.limit <= 0 || answer.kvs.len() as i64 <= range.limit, "the limit holds");
        let inside = |key: &[u8]| match &range.range_end[..] {
            [] => key == &range.key[..],
            [0] => key >= &range.key[..],
            end => key >= &range.key[..] && key < end,
        };
        assert!(answer.kvs.iter().all(|kv| inside(kv.key())), "keys are within the interval");
        let by_key = range.sort_target() == range_request::SortTarget::Key;
        if by_key && range.sort_order() != range_request::SortOrder::Descend {
            assert!(answer.kvs.windows(2).all(|two| two[0].key() < two[1].key()), "keys ascend");
        }
        while !state.sweep(1) {}
        assert_eq!(state.range(&range).ok(), Some(answer), "a sweep is invisible");
    }
    if let Ok(txn) = TxnRequest::decode(data)
        && validate::txn(&txn, &validate::Limits::default()).is_ok()
        && kv::is_read_only(&txn)
    {
        let _ = state.read_txn(&txn);
    }
}

fn survives<M: prost::Message + Default + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<M> {
    let message = M::decode(data).ok()?;
    let again = M::decode(&message.encode_to_vec()[..]).expect("what was encoded decodes");
    assert_eq!(again, message, "a message survives its encoding");
    Some(message)
}

/// Members' messages: what decodes survives its encoding; entries survive the way to the log and back.
pub(super) fn peer_messages(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 10 {
        0 => {
            let Some(append) = survives::<peer::AppendRequest>(data) else { return };
            for entry in append.entries {
                let Ok(entry) = convert::entry_from_pb(entry) else { continue };
                let record = convert::entry_to_record(entry.clone());
                let read = convert::entry_from_record(record).expect("what was appended can be read");
                assert_eq!(read.log_id, entry.log_id);
                assert_eq!(convert::entry_to_pb(read), convert::entry_to_pb(entry), "the log keeps what was sent");
            }
        }
        1 => drop(survives::<peer::VoteRequest>(data)),
        2 => drop(survives::<peer::AppendResponse>(data)),
        3 => drop(survives::<peer::SnapshotChunk>(data)),
        4 => drop(survives::<peer::ForwardRequest>(data)),
        5 => drop(survives::<peer::ForwardResponse>(data)),
        6 => {
            if let Some(membership) = survives::<log::Membership>(data)
                && let Ok(taken) = convert::membership_from_pb(&membership)
            {
                let again = convert::membership_from_pb(&convert::membership_to_pb(&taken));
                assert_eq!(again.as_ref(), Ok(&taken), "a membership survives its encoding");
            }
        }
        7 => drop(survives::<peer::WhoResponse>(data)),
        8 => drop(survives::<peer::JoinRequest>(data)),
        _ => {
            let Some(formation) = survives::<log::Formation>(data) else { return };
            drop(crate::raft::initial_members(&formation));
        }
    }
}

/// A key-value pair: parsed by hand, and by prost through the same type; both agree, and the normalized form is stable.
pub(super) fn key_value(data: &[u8]) {
    let (fast, slow) = (KeyValue::from_encoded(data), KeyValue::decode(data));
    if let (Ok(fast), Ok(slow)) = (&fast, &slow) {
        assert_eq!(fast.as_encoded(), slow.as_encoded(), "both ways of decoding agree");
    }
    let Ok(kv) = fast else { return };
    let fields = kv.fields();
    assert_eq!(kv.key(), fields.key, "the short way to the key is right");
    assert_eq!(KeyValue::new(fields), kv, "the encoding is normal");
    assert_eq!(KeyValue::from_encoded(kv.as_encoded()).as_ref(), Ok(&kv));
}

/// Changes as a snapshot block or a state record holds them: either they are refused, or they make a state that is whole.
pub(super) fn changes(data: &[u8]) {
    let Some((revision, mut rest)) = data.split_first() else { return };
    let mut loader = Loader::new();
    while !rest.is_empty() {
        let Ok(change) = change::decode_next(&mut rest) else { return };
        let mut bytes = Vec::new();
        change::encode(&change, &mut bytes);
        assert_eq!(bytes.len(), change::encoded_len(&change));
        assert_eq!(change::decode_next(&mut &bytes[..]).as_ref(), Ok(&change), "a change survives its encoding");
        if loader.load(change).is_err() {
            return;
        }
    }
    let Ok(state) = loader.finish(i64::from(*revision)) else { return };
    let again = reloaded(&state);
    let hash = |state: &State| state.hash_kv(0).expect("the present can be hashed");
    assert_eq!(hash(&state), hash(&again), "what was loaded can be saved");
    assert_eq!(state.key_count(), again.key_count());
}

/// A log id for states that are made here.
pub(super) fn log_id(index: u64) -> LogId {
    LogId { term: 1, index }
}
