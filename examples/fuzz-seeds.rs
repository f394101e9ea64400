//! Writes the seeds of the fuzz targets below `fuzz/corpus`: what the program itself encodes, and the bytes that this project's
//! client and a plain HTTP client send over a connection.
//!
//! `cargo run --example fuzz-seeds`; needs the feature `testing`, which examples have through the tests' dependencies.

use std::path::Path;

use quorate::fuzzing::seeds;
use quorate::pb::etcd::PutRequest;
use quorate::pb::etcd::kv_client::KvClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut all = seeds::all();
    for (name, authority) in [("client", None), ("client-with-scheme", Some("http://kv-0.kv:2379"))] {
        all.push(("authority", name, [&[7], &sent(authority).await?[..]].concat()));
    }
    all.push(("authority", "http-1", b"\x03GET /health HTTP/1.1\r\nHost: http://x\r\n\r\n".to_vec()));
    let (mut files, mut bytes) = (0, 0);
    for (target, name, seed) in all {
        std::fs::create_dir_all(root.join(target))?;
        std::fs::write(root.join(target).join(name), &seed)?;
        (files, bytes) = (files + 1, bytes + seed.len());
    }
    println!("{files} seeds of {bytes} bytes written below {}", root.display());
    Ok(())
}

/// What a client sends until it waits for an answer; with the `:authority` of its own, if one is given.
async fn sent(authority: Option<&str>) -> std::io::Result<Vec<u8>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let client = tokio::spawn(async move {
        if let Ok(mut client) = KvClient::connect(endpoint).await {
            let _ = client.put(PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }).await;
        }
    });
    let (mut connection, from) = listener.accept().await?;
    // An empty SETTINGS frame, without which a client sends no request.
    connection.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(Ok(read @ 1..)) =
        tokio::time::timeout(std::time::Duration::from_millis(300), connection.read(&mut piece)).await
    {
        bytes.extend_from_slice(&piece[..read]);
    }
    client.abort();
    let _ = from;
    Ok(match authority {
        None => bytes,
        Some(text) => with_authority(&bytes, text),
    })
}

/// The first HEADERS frame replaced by one with that `:authority` as a plain literal.
fn with_authority(bytes: &[u8], text: &str) -> Vec<u8> {
    const PREFACE_BYTES: usize = 24;
    let mut out = bytes[..PREFACE_BYTES].to_vec();
    let mut at = PREFACE_BYTES;
    while let Some(head) = bytes.get(at..at + 9) {
        let end = at + 9 + u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        if head[3] == 1 {
            let block = [&[0x83, 0x86, 0x41, text.len() as u8], text.as_bytes()].concat();
            out.extend_from_slice(&(block.len() as u32).to_be_bytes()[1..]);
            out.extend_from_slice(&head[3..]);
            out.extend_from_slice(&block);
        } else {
            out.extend_from_slice(&bytes[at..end.min(bytes.len())]);
        }
        at = end;
    }
    out
}
