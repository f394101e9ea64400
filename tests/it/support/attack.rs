//! Clients that a server must survive: they speak HTTP/2 by hand, so that they can break its rules.
//!
//! Absent: judgement; the tests measure the server and the good clients meanwhile.

use std::io;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const END_STREAM: u8 = 1;

/// Where this process's connections come from; not set: where the system says.
pub static HOST: OnceLock<IpAddr> = OnceLock::new();

pub async fn connect(endpoint: &str) -> io::Result<TcpStream> {
    let Some(host) = HOST.get() else { return TcpStream::connect(endpoint).await };
    let socket = TcpSocket::new_v4()?;
    socket.bind((*host, 0).into())?;
    socket.connect(endpoint.parse().map_err(io::Error::other)?).await
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a gRPC request.
fn block(path: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    [
        vec![0x83, 0x86],
        [&[0x04], &text(path)[..]].concat(),
        [&[0x01], &text("kv:2379")[..]].concat(),
        [&[0x0f, 0x10], &text("application/grpc")[..]].concat(),
        [&[0x00], &text("te")[..], &text("trailers")].concat(),
    ]
    .concat()
}

fn message(content: &[u8]) -> Vec<u8> {
    [&[0][..], &(content.len() as u32).to_be_bytes(), content].concat()
}

/// A connection that has said hello, and that its owner reads or not.
pub struct Raw {
    pub stream: TcpStream,
    next: u32,
}

impl Raw {
    pub async fn connect(endpoint: &str) -> io::Result<Self> {
        let mut stream = connect(endpoint).await?;
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await?;
        Ok(Self { stream, next: 1 })
    }

    fn id(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// A whole request whose answer nobody reads.
    pub async fn ask(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        let id = self.id();
        let request = [frame(HEADERS, END_HEADERS, id, &block(path)), frame(DATA, END_STREAM, id, &message(content))];
        self.stream.write_all(&request.concat()).await
    }

    /// A stream of whole requests that goes on; nobody reads what it is answered.
    pub async fn open(&mut self, path: &str, contents: &[Vec<u8>]) -> io::Result<()> {
        let id = self.id();
        let mut out = frame(HEADERS, END_HEADERS, id, &block(path));
        for content in contents {
            message(content).chunks(16 << 10).for_each(|piece| out.extend(frame(DATA, 0, id, piece)));
        }
        self.stream.write_all(&out).await
    }

    /// The beginning of a put of 1 MiB: so many bytes of it, and no more.
    pub async fn begin_put(&mut self, bytes: usize) -> io::Result<()> {
        self.begin("/etcdserverpb.KV/Put", 1 << 20, bytes).await
    }

    /// The beginning of a call: so many bytes of a message that has `whole`.
    pub async fn begin(&mut self, path: &str, whole: u32, bytes: usize) -> io::Result<()> {
        let id = self.id();
        let mut out = frame(HEADERS, END_HEADERS, id, &block(path));
        let begun = [&[0][..], &whole.to_be_bytes(), &vec![0; bytes]].concat();
        begun.chunks(16 << 10).for_each(|piece| out.extend(frame(DATA, 0, id, piece)));
        self.stream.write_all(&out).await
    }

    /// Streams that are reset as soon as they were opened.
    pub async fn flood_resets(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            let id = self.id();
            let headers = frame(HEADERS, END_HEADERS | END_STREAM, id, &block("/etcdserverpb.KV/Range"));
            self.stream.write_all(&[headers, frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()).await?;
        }
        Ok(())
    }

    /// So many calls, each cancelled as soon as it was made, in one write.
    pub async fn cancel_at_once(&mut self, count: usize) -> io::Result<()> {
        let mut out = Vec::new();
        for _ in 0..count {
            let id = self.id();
            out.extend(frame(HEADERS, END_HEADERS, id, &block("/etcdserverpb.KV/Range")));
            out.extend(frame(DATA, END_STREAM, id, &message(b"\x0a\x01k")));
            out.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        }
        self.stream.write_all(&out).await
    }

    /// Reads until the server has ended the stream that was opened last, or the connection.
    pub async fn is_answered(&mut self) -> io::Result<bool> {
        let newest = self.next - 2;
        loop {
            let mut head = [0; 9];
            if self.stream.read_exact(&mut head).await.is_err() {
                return Ok(false);
            }
            let [_, a, b, c] = u32::from_be_bytes([0, head[0], head[1], head[2]]).to_be_bytes();
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.stream.read_exact(&mut payload).await?;
            let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
            if stream == newest && head[3] == HEADERS && head[4] & END_STREAM != 0 {
                return Ok(true);
            }
        }
    }

    /// Control frames that each want an answer, which nobody reads.
    pub async fn flood_control(&mut self, count: usize) -> io::Result<()> {
        let piece = [frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9])].concat().repeat(64);
        for _ in 0..count / 128 {
            within(self.stream.write_all(&piece)).await?;
        }
        Ok(())
    }

    /// One request whose headers never end.
    pub async fn flood_headers(&mut self, count: usize) -> io::Result<()> {
        let id = self.id();
        self.stream.write_all(&frame(HEADERS, 0, id, &block("/x"))).await?;
        let header = [&[0x00, 1, b'x', 0x7f, 0x81, 0x7e][..], &vec![b'y'; 0x3f00 + 0x80]].concat();
        let piece = frame(CONTINUATION, 0, id, &header[..header.len().min(16_384)]);
        for _ in 0..count {
            within(self.stream.write_all(&piece)).await?;
        }
        Ok(())
    }

    /// Frames of random kinds and contents.
    pub async fn flood_nonsense(&mut self, seed: u64, count: usize) -> io::Result<()> {
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..count {
            let payload: Vec<u8> = (0..random.usize(..64)).map(|_| random.u8(..)).collect();
            within(self.stream.write_all(&frame(random.u8(..12), random.u8(..), random.u32(..9), &payload))).await?;
        }
        Ok(())
    }

    /// How long until the server closed the connection; `None` if it had not after `patience`. Reads and drops what comes.
    pub async fn closed_within(&mut self, patience: Duration) -> Option<Duration> {
        closed_within(&mut self.stream, patience).await
    }
}

async fn within(sending: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    // A server that reads no more is as good as one that has closed.
    match tokio::time::timeout(Duration::from_secs(5), sending).await {
        Ok(sent) => sent,
        Err(_) => Err(io::ErrorKind::WouldBlock.into()),
    }
}

pub async fn closed_within(stream: &mut TcpStream, patience: Duration) -> Option<Duration> {
    let begin = Instant::now();
    let mut piece = [0; 4096];
    let reading = async { while let Ok(1..) = stream.read(&mut piece).await {} };
    tokio::time::timeout(patience, reading).await.ok().map(|()| begin.elapsed())
}

/// Sends a byte every `pause` until the server closes; how long that took, or `None` after `patience`.
pub async fn dribble(endpoint: &str, text: &[u8], pause: Duration, patience: Duration) -> Option<Duration> {
    let mut stream = TcpStream::connect(endpoint).await.ok()?;
    let begin = Instant::now();
    for byte in text.iter().cycle() {
        if begin.elapsed() > patience {
            return None;
        }
        if stream.write_all(&[*byte]).await.is_err() || closed_within(&mut stream, pause).await.is_some() {
            break;
        }
    }
    Some(begin.elapsed())
}
