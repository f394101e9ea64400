//! The proposer's batches near the quota: what they add was counted, however many are in flight.

use super::turns::{Played, proposal};
use super::*;
use crate::kv::tests::growth::any_command;
use crate::kv::{AUTH_SINCE, most_with_ends};
use crate::pb::etcd::PutRequest;
use crate::pb::log::command::Request;

fn put_of(key: &str, value: usize, ignore_value: bool) -> Command {
    let (key, value) = (key.to_owned().into(), vec![7; value].into());
    Command::new(AUTH_SINCE, Request::Put(PutRequest { key, value, ignore_value, ..PutRequest::default() }))
}

#[tokio::test(start_paused = true)]
async fn what_batches_add_was_counted_and_never_passes_the_quota() {
    const QUOTA: u64 = 300 << 10;
    let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..12 {
        let mut played = Played::start(Some(QUOTA)).await;
        for _ in 0..150 {
            for _ in 0..random.usize(..20) {
                played.ask(proposal(random.u64(1..4), any_command(&mut random)));
            }
            played.round();
            // Several rounds may be in flight.
            while played.in_flight() > 0 && random.u8(..3) > 0 {
                let before = played.node.store().read(|s| s.kv.bytes_with_ends());
                let adds = played.apply_next();
                let after = played.node.store().read(|s| s.kv.bytes_with_ends());
                assert!(after <= before + adds, "{} added, {adds} counted", after - before);
                assert!(after <= most_with_ends(QUOTA), "{after} bytes, with the ends of keys");
                played.node.store().write(|s| s.kv.sweep(random.usize(..9)));
                taken += 1;
            }
            refused += played.refused();
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} batches were taken, {refused} commands refused");
}

/// 3,000 small puts that keep a value, behind one that makes it large.
#[tokio::test(start_paused = true)]
async fn small_puts_that_copy_a_large_value_fill_no_memory() {
    const QUOTA: u64 = 32 << 20;
    const LARGE: usize = 1 << 20;
    for first in ["in flight", "in the same round", "applied"] {
        let mut played = Played::start(Some(QUOTA)).await;
        played.ask(proposal(1, put_of("k", 1, false)));
        played.round();
        played.apply_next();
        played.ask(proposal(1, put_of("k", LARGE, false)));
        if first != "in the same round" {
            played.round();
        }
        if first == "applied" {
            played.apply_next();
        }
        for _ in 0..3000 {
            played.ask(proposal(2, put_of("k", 0, true)));
        }
        let mut largest = 0;
        while played.waits() || played.in_flight() > 0 {
            played.round();
            while played.in_flight() > 0 {
                let before = played.node.store().read(|s| s.kv.bytes());
                played.apply_next();
                largest = largest.max(played.node.store().read(|s| s.kv.bytes()) - before);
            }
        }
        let bytes = played.node.store().read(|s| s.kv.bytes());
        assert!(bytes <= QUOTA && bytes > QUOTA - 2 * LARGE as u64, "{bytes} bytes, {first}");
        assert!(largest <= 18 << 20, "one entry copies {largest} bytes, {first}");
        assert!(played.refused() > 2900);
    }
}
