//! What applying a put costs, with the digest that members compare and without it, on one core.
//!
//! `cargo run --release --example apply-bench [-- PUTS]`. Alternates the two, five times each, and prints the medians.

use quorate::kv::State;
use quorate::pb::etcd::PutRequest;
use quorate::pb::log::{Command, command};

const KEYS: usize = 100_000;

fn commands(count: usize) -> Vec<Command> {
    let put = |i: usize| {
        let key = format!("key-{:08}", i * 7919 % KEYS);
        let put = PutRequest { key: key.into(), value: vec![i as u8; 256].into(), ..PutRequest::default() };
        Command::new(1, command::Request::Put(put))
    };
    (0..count).map(put).collect()
}

/// Nanoseconds a put.
fn run(commands: &[Command], digest: bool) -> f64 {
    let mut state = State::new();
    if !digest {
        state.set_digest(None);
    }
    let begin = std::time::Instant::now();
    for command in commands {
        let _ = std::hint::black_box(state.apply(command, false));
    }
    assert_eq!(state.digest().is_some(), digest);
    begin.elapsed().as_nanos() as f64 / commands.len() as f64
}

fn main() {
    let count = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(200_000);
    let commands = commands(count);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        for digest in [false, true] {
            times[usize::from(digest)].push(run(&commands, digest));
        }
    }
    let [without, with] = times.map(|mut all| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    });
    println!("{count} puts of 256 bytes: {without:.0} ns each without the digest, {with:.0} ns with it");
}
