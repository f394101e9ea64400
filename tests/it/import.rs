//! A short version of `examples/import-debian`: what is acknowledged while members are killed is still there afterwards.

#[path = "../../examples/import-debian/run.rs"]
mod run;

use std::time::Duration;

use crate::support::cluster::Cluster;

const STANZAS: usize = 3000;

/// A list in the form of Debian's, with one stanza that is larger than a request may be.
fn list(seed: u64) -> String {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut list = String::new();
    for n in 0..STANZAS {
        let words: Vec<String> = (0..rng.usize(20..120)).map(|_| format!("{:x}", rng.u32(..))).collect();
        list += &format!("Package: package-{n}\nVersion: 1:{}.{}-1\nDescription: {}\n\n", n % 7, n, words.join(" "));
    }
    list + &format!("Package: huge\nVersion: 1\nDescription: {}\n", "x".repeat(2 << 20))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_while_members_are_killed() {
    let seed = fastrand::u64(..1 << 32);
    println!("seed {seed}");
    let stanzas = run::stanzas(list(seed).as_bytes());
    assert_eq!((stanzas.len(), &stanzas[0].key[..]), (STANZAS + 1, &b"debian/huge/1"[..]));
    let mut cluster = Cluster::new(3);
    // An election takes more than a second: killing faster would only keep the cluster from working.
    let options = run::Options { clients: 8, kill_every: Duration::from_secs(2), seed };
    let report = run::run(&mut cluster, stanzas, &options).await;
    println!("{report}");
    assert!(report.lost.is_empty(), "{:?}", report.lost);
    assert_eq!((report.acknowledged, report.too_large), (STANZAS, vec!["debian/huge/1".to_owned()]));
    assert!(report.kills > 0, "the import was over before a member was killed");
}
