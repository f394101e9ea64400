//! Deliberate differences in our answers, to see that each is noticed.
//!
//! They are put into a copy of an answer that both servers gave alike, in the place of a fault of the server. So every run says of
//! itself whether it would have found them.

use serde_json::{Value, json};

use crate::call::{Call, EXPIRE};

/// A name, and what changes the answer to `call`; whether it did.
pub type Planted = (&'static str, fn(&Call, &mut Value) -> bool);

pub const PLANTED: &[Planted] = &[
    ("a count is one too high", |_, answer| bump(answer, "count")),
    ("the header's revision is off by one", |_, answer| {
        message(answer).and_then(|m| m.get_mut("header")).is_some_and(|header| bump_field(header, "revision"))
    }),
    ("an error has another text", |_, answer| {
        set(answer.pointer_mut("/error/text"), json!("etcdserver: something else"))
    }),
    ("an error has another code", |_, answer| set(answer.pointer_mut("/error/code"), json!("Internal"))),
    ("`more` is lost", |_, answer| message(answer).is_some_and(|m| remove(m, "more"))),
    ("`prev_kv` is lost", |_, answer| message(answer).is_some_and(|m| remove(m, "prev_kv"))),
    ("two keys are exchanged", |_, answer| {
        let kvs = message(answer).and_then(|m| m.get_mut("kvs")).and_then(Value::as_array_mut);
        kvs.filter(|kvs| kvs.len() > 1).map(|kvs| kvs.swap(0, 1)).is_some()
    }),
    ("a transaction's other branch was taken", |_, answer| message(answer).is_some_and(|m| remove(m, "succeeded"))),
    ("a watcher misses its last event", |call, answer| {
        let watchers = (call.method == "Watch/Watch").then(|| answer["watchers"].as_object_mut()).flatten();
        let mut events =
            watchers.into_iter().flat_map(|all| all.values_mut()).filter_map(|told| told.get_mut("events"));
        events.next().and_then(Value::as_array_mut).is_some_and(|events| events.pop().is_some())
    }),
    ("a watcher of the past, through the gateway, misses its first event", |_, answer| {
        let told = answer.get("http").is_some().then(|| answer.pointer_mut("/told/events"));
        told.flatten()
            .and_then(Value::as_array_mut)
            .is_some_and(|events| !events.is_empty() && !events.remove(0).is_null())
    }),
    ("an event has lost what was before it", |_, answer| {
        let events = answer.pointer_mut("/told/events").and_then(Value::as_array_mut);
        events.into_iter().flatten().any(|event| remove(event, "prev_kv"))
    }),
    ("a lease that has ended is still there", |call, answer| {
        call.method == EXPIRE && set(answer.pointer_mut("/lease/messages/0/TTL"), json!("1"))
    }),
    ("a key outlives its lease", |call, answer| {
        let keys = (call.method == EXPIRE).then(|| answer.pointer_mut("/keys/messages/0/kvs")).flatten();
        keys.and_then(Value::as_array_mut).is_some_and(|keys| keys.pop().is_some())
    }),
    ("a lease has a key too few", |call, answer| {
        let keys = (call.method == "Lease/LeaseTimeToLive").then(|| message(answer)).flatten();
        keys.and_then(|m| m.get_mut("keys")).and_then(Value::as_array_mut).is_some_and(|keys| keys.pop().is_some())
    }),
    ("a key's version is one too high", |_, answer| {
        message(answer).and_then(|m| m.pointer_mut("/kvs/0")).is_some_and(|kv| bump_field(kv, "version"))
    }),
    ("the gateway answers 500 for 400", |_, answer| answer["http"] == 400 && set(answer.get_mut("http"), json!(500))),
];

fn message(answer: &mut Value) -> Option<&mut Value> {
    answer.get_mut("messages")?.get_mut(0)
}

fn bump(answer: &mut Value, field: &str) -> bool {
    message(answer).is_some_and(|message| bump_field(message, field))
}

fn bump_field(object: &mut Value, field: &str) -> bool {
    let number = object.get(field).and_then(Value::as_str).and_then(|text| text.parse::<i64>().ok());
    number.map(|number| object[field] = json!((number + 1).to_string())).is_some()
}

fn remove(object: &mut Value, field: &str) -> bool {
    object.as_object_mut().and_then(|fields| fields.remove(field)).is_some()
}

fn set(place: Option<&mut Value>, value: Value) -> bool {
    place.map(|place| *place = value).is_some()
}
