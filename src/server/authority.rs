//! Lets in clients whose `:authority` is none.
//!
//! etcd's Go clients up to 3.5 put the endpoint there as the user wrote it (`http://10.0.0.1:2379`), or
//! `#initially=[...]` (etcd #13192). Go servers take that; the HTTP/2 library here refuses the request as malformed, and has
//! no switch. Nothing here needs the authority, so what is not a valid one is made one on its way in.
//!
//! Owns a filter over the bytes of one connection: it counts frames, and the streams that the client resets at once, finds the HEADERS frames of HTTP/2 (RFC 9113) and in them the literal
//! of `:authority` (HPACK, RFC 7541). Invariant: the new text has as many characters as the old one, so that both ends'
//! dynamic tables stay alike, and no frame grows. Everything else passes as it is: HTTP/1, other frames, what is malformed,
//! a header block whose authority lies in a CONTINUATION frame.

use std::borrow::Cow;

use axum::http::uri::Authority;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// A longer frame is refused by the library, whatever it holds. As little as that is held of a frame that comes slowly.
const FRAME_BYTES_MAX: usize = FRAME_HEAD_BYTES + (16 << 10);
/// Place of `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;

/// HPACK's code is canonical, so the lengths (in bits) give it. These are the printable characters but `\`; any other is
/// longer, and in no authority that a client means.
const CODE: [(u32, &[u8]); 10] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
];

#[derive(Default)]
enum Stage {
    #[default]
    Preface,
    /// Bytes of the present frame that pass unseen.
    Frames { skip: usize },
    /// This is not HTTP/2.
    Off,
}

/// The filter of one connection.
#[derive(Default)]
pub(crate) struct Filter {
    stage: Stage,
    /// The beginning of something of which the end has not come yet.
    held: Vec<u8>,
    /// The newest stream, and the newest of those whose requests the server has taken.
    newest: u32,
    taken: u32,
    resets: usize,
    frames: usize,
}

impl Filter {
    /// Whether this is HTTP/2; `None` while what has come may become its preface.
    pub(crate) fn is_http2(&self) -> Option<bool> {
        match self.stage {
            Stage::Preface => None,
            Stage::Frames { .. } => Some(true),
            Stage::Off => Some(false),
        }
    }

    /// The server has taken every request that has passed.
    pub(crate) fn all_taken(&mut self) {
        self.taken = self.newest;
    }

    /// Streams that were reset before the server has taken their requests, since this was asked last.
    pub(crate) fn take_resets(&mut self) -> usize {
        std::mem::take(&mut self.resets)
    }

    /// Frames that have arrived since this was asked last, and other pieces of bytes.
    pub(crate) fn take_frames(&mut self) -> usize {
        std::mem::take(&mut self.frames)
    }

    /// Takes what has arrived, and gives what may go on; borrowed if that is the same.
    pub(crate) fn pass<'a>(&mut self, chunk: &'a [u8]) -> Cow<'a, [u8]> {
        let data = if self.held.is_empty() {
            Cow::Borrowed(chunk)
        } else {
            let mut all = std::mem::take(&mut self.held);
            all.extend_from_slice(chunk);
            Cow::Owned(all)
        };
        let mut out = None;
        let mut copied = 0;
        let mut at = 0;
        while let Some((step, is_headers)) = self.step(&data[at..]) {
            if is_headers && let Some(frame) = rewrite(&data[at..at + step]) {
                let out = out.get_or_insert_with(Vec::new);
                out.extend_from_slice(&data[copied..at]);
                out.extend_from_slice(&frame);
                copied = at + step;
            }
            at += step;
            self.frames += 1;
        }
        self.held = data[at..].to_vec();
        match (out, data) {
            (Some(mut out), data) => {
                out.extend_from_slice(&data[copied..at]);
                Cow::Owned(out)
            }
            (None, Cow::Borrowed(data)) => Cow::Borrowed(&data[..at]),
            (None, Cow::Owned(mut data)) => {
                data.truncate(at);
                Cow::Owned(data)
            }
        }
    }

    /// How many bytes can be looked at now, and whether they are a HEADERS frame; `None` if more are needed, or none are
    /// left.
    fn step(&mut self, rest: &[u8]) -> Option<(usize, bool)> {
        if rest.is_empty() {
            return None;
        }
        match &mut self.stage {
            Stage::Off => Some((rest.len(), false)),
            Stage::Preface if rest.starts_with(PREFACE) => {
                self.stage = Stage::Frames { skip: 0 };
                Some((PREFACE.len(), false))
            }
            Stage::Preface if PREFACE.starts_with(rest) => None,
            Stage::Preface => {
                self.stage = Stage::Off;
                Some((rest.len(), false))
            }
            Stage::Frames { skip } if *skip > 0 => {
                let step = rest.len().min(*skip);
                *skip -= step;
                Some((step, false))
            }
            Stage::Frames { skip } => {
                let head = rest.first_chunk::<FRAME_HEAD_BYTES>()?;
                let frame_bytes = FRAME_HEAD_BYTES + u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
                if head[3] == HEADERS {
                    self.newest = self.newest.max(stream);
                }
                if head[3] == HEADERS && frame_bytes <= FRAME_BYTES_MAX {
                    return (rest.len() >= frame_bytes).then_some((frame_bytes, true));
                }
                let step = rest.len().min(frame_bytes);
                *skip = frame_bytes - step;
                self.resets += usize::from(head[3] == RST_STREAM && stream > self.taken);
                Some((step, false))
            }
        }
    }
}

/// The HEADERS frame with a valid authority, if its own is not valid.
fn rewrite(frame: &[u8]) -> Option<Vec<u8>> {
    let head = frame.first_chunk::<FRAME_HEAD_BYTES>()?;
    let mut begin = FRAME_HEAD_BYTES;
    let mut end = frame.len();
    if head[4] & PADDED != 0 {
        end = end.checked_sub(usize::from(*frame.get(begin)?))?;
        begin += 1;
    }
    if head[4] & PRIORITY != 0 {
        begin += 5;
    }
    let (value_begin, value_end, value) = bad_authority(frame.get(..end)?, begin)?;
    let mut new = [&frame[..value_begin], &value, &frame[value_end..]].concat();
    let length = u32::try_from(new.len() - FRAME_HEAD_BYTES).ok()?.to_be_bytes();
    new[..3].copy_from_slice(&length[1..]);
    Some(new)
}

/// Where in a header block an invalid `:authority` stands, and the literal to put there.
fn bad_authority(block: &[u8], mut at: usize) -> Option<(usize, usize, Vec<u8>)> {
    while let Some(&first) = block.get(at) {
        let literal_bits = match first {
            0x80.. => {
                integer(block, &mut at, 7)?;
                continue;
            }
            0x40.. => 6,
            0x20.. => {
                integer(block, &mut at, 5)?;
                continue;
            }
            _ => 4,
        };
        let name = integer(block, &mut at, literal_bits)?;
        let is_authority =
            if name == 0 { text(block, &mut at)?.as_deref() == Some(b":authority") } else { name == AUTHORITY };
        let begin = at;
        let is_coded = block.get(at)? & 0x80 != 0;
        if !is_authority {
            skip_text(block, &mut at)?;
            continue;
        }
        if let Some(old) = text(block, &mut at)?
            && Authority::try_from(&old[..]).is_err()
        {
            return Some((begin, at, literal(&old, is_coded)));
        }
    }
    None
}

/// A string literal of a valid authority as long as `old`. No character takes more bits than the one it stands for.
fn literal(old: &[u8], is_coded: bool) -> Vec<u8> {
    let valid: Vec<u8> = old.iter().map(|c| if c.is_ascii_alphanumeric() || *c == b'.' { *c } else { b'-' }).collect();
    let body = if is_coded { encode(&valid) } else { valid };
    let mut out = Vec::with_capacity(body.len() + 4);
    let flag = if is_coded { 0x80 } else { 0 };
    let mut rest = body.len();
    if rest < 0x7f {
        out.push(flag | rest as u8);
    } else {
        out.push(flag | 0x7f);
        rest -= 0x7f;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(&body);
    out
}

/// HPACK's integer with a prefix of so many bits.
fn integer(block: &[u8], at: &mut usize, prefix_bits: u32) -> Option<usize> {
    let mask = (1_usize << prefix_bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    for shift in (0..28).step_by(7) {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn skip_text<'a>(block: &'a [u8], at: &mut usize) -> Option<&'a [u8]> {
    let length = integer(block, at, 7)?;
    let body = block.get(*at..)?.get(..length)?;
    *at += length;
    Some(body)
}

/// A string literal, decoded; inside `None` if it has a character that [`CODE`] lacks.
fn text(block: &[u8], at: &mut usize) -> Option<Option<Vec<u8>>> {
    let is_coded = block.get(*at)? & 0x80 != 0;
    let body = skip_text(block, at)?;
    Some(if is_coded { decode(body) } else { Some(body.to_vec()) })
}

/// Each length with its characters and the code of the first of them.
fn code() -> impl Iterator<Item = (u32, &'static [u8], u32)> {
    let mut next = (0, 0);
    CODE.iter().map(move |(bits, characters)| {
        let first = next.1 << (bits - next.0);
        next = (*bits, first + characters.len() as u32);
        (*bits, *characters, first)
    })
}

fn encode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    // A closing run of ones is how HPACK fills the last byte.
    let (mut pending, mut pending_bits) = (0_u64, 0);
    for character in text {
        for (bits, characters, first) in code() {
            if let Some(i) = characters.iter().position(|c| c == character) {
                pending = pending << bits | u64::from(first + i as u32);
                pending_bits += bits;
            }
        }
        while pending_bits >= 8 {
            pending_bits -= 8;
            out.push((pending >> pending_bits) as u8);
        }
    }
    if pending_bits > 0 {
        let fill = 8 - pending_bits;
        out.push((pending << fill | ((1 << fill) - 1)) as u8);
    }
    out
}

fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(2 * coded.len());
    let bit = |n: usize| u32::from(coded[n / 8] >> (7 - n % 8) & 1);
    let total = 8 * coded.len();
    let mut at = 0;
    'characters: while at < total {
        let (mut word, mut have) = (0, 0);
        for (bits, characters, first) in code() {
            while have < bits && at + (have as usize) < total {
                word = word << 1 | bit(at + have as usize);
                have += 1;
            }
            if have < bits {
                break;
            }
            if let Some(character) = characters.get(word.wrapping_sub(first) as usize) {
                out.push(*character);
                at += bits as usize;
                continue 'characters;
            }
        }
        // What is left must be the filling.
        return (total - at < 8 && word == (1 << have) - 1).then_some(out);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// `:method POST`, then a literal authority with incremental indexing, then one more header.
    fn request(authority: &[u8], coded: bool) -> Vec<u8> {
        let body = if coded { encode(authority) } else { authority.to_vec() };
        assert!(body.len() < 0x7f);
        let flag = if coded { 0x80 } else { 0 };
        [&[0x83, 0x41, flag | body.len() as u8], &body[..], &[0x40, 2, b't', b'e', 1, b'x']].concat()
    }

    fn authority_of(frame: &[u8]) -> Vec<u8> {
        let mut at = FRAME_HEAD_BYTES + 2;
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]) as usize;
        assert_eq!(frame.len(), FRAME_HEAD_BYTES + length, "the frame says how long it is");
        let text = text(frame, &mut at).unwrap().unwrap();
        assert_eq!(&frame[at..], [0x40, 2, b't', b'e', 1, b'x'], "what follows is as it was");
        text
    }

    #[test]
    fn the_code_is_that_of_the_standard() {
        // RFC 7541, C.4.1 and C.6.1.
        let coded = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(
            (decode(&coded).unwrap(), encode(b"www.example.com")),
            (b"www.example.com".to_vec(), coded.to_vec())
        );
        let date = [
            0xd0, 0x7a, 0xbe, 0x94, 0x10, 0x54, 0xd4, 0x44, 0xa8, 0x20, 0x05, 0x95, 0x04, 0x0b, 0x81, 0x66, 0xe0, 0x82,
            0xa6, 0x2d, 0x1b, 0xff,
        ];
        assert_eq!(decode(&date).unwrap(), b"Mon, 21 Oct 2013 20:13:21 GMT");
        let all: Vec<u8> = (b' '..=b'~').filter(|c| *c != b'\\').collect();
        assert_eq!(decode(&encode(&all)).unwrap(), all);
        assert_eq!(decode(&[0xff; 8]), None, "no filling is that long");
    }

    #[test]
    fn an_invalid_authority_becomes_a_valid_one_of_the_same_length() {
        for authority in
            ["http://127.0.0.1:2379", "#initially=[10.0.0.1:2379;10.0.0.2:2379]", "unix:///run/kv.sock", "a b", ""]
        {
            for coded in [false, true] {
                let old = frame(HEADERS, 4, &request(authority.as_bytes(), coded));
                let mut filter = Filter::default();
                assert_eq!(filter.pass(PREFACE), PREFACE);
                let new = filter.pass(&old);
                let text = authority_of(&new);
                assert_eq!(text.len(), authority.len());
                assert!(authority.is_empty() || Authority::try_from(&text[..]).is_ok(), "{text:?}");
                assert!(new.len() <= old.len());
            }
        }
    }

    #[test]
    fn what_needs_no_change_passes_however_it_is_cut() {
        let bad = frame(HEADERS, 4, &request(b"http://kv", true));
        let mut filter = Filter::default();
        filter.pass(PREFACE);
        let good = filter.pass(&bad).into_owned();
        let around = [
            frame(4, 0, &[7; 36]),
            frame(HEADERS, 4, &request(b"kv-0.kv:2379", true)),
            frame(HEADERS, 4, &[0x82, 0xbe, 0x3f, 0xe1, 0x1f]),
            frame(0, 1, &[1; 5000]),
            // Data that looks like a HEADERS frame.
            frame(0, 1, &bad),
            frame(HEADERS, 0x2c, &[&[3, 0, 0, 0, 0, 9], &request(b"kv", false)[..], &[0; 3]].concat()),
            // Malformed: the string is longer than the frame.
            frame(HEADERS, 4, &[0x41, 0x50, b'/']),
        ]
        .concat();
        let sent = [PREFACE, &around, &bad, &around].concat();
        let expected = [PREFACE, &around, &good, &around].concat();
        for size in [1, 2, 7, 24, 100, 4096, sent.len()] {
            let mut filter = Filter::default();
            let got: Vec<u8> = sent.chunks(size).flat_map(|chunk| filter.pass(chunk).into_owned()).collect();
            assert_eq!(got, expected, "in pieces of {size}");
        }
        let mut filter = Filter::default();
        assert!(matches!(filter.pass(&[PREFACE, &around].concat()), Cow::Borrowed(_)), "nothing is copied");
    }

    #[test]
    fn http_1_passes() {
        let request = b"GET /health HTTP/1.1\r\nHost: http://x\r\n\r\n";
        for size in [1, 3, request.len()] {
            let mut filter = Filter::default();
            let got: Vec<u8> = request.chunks(size).flat_map(|chunk| filter.pass(chunk).into_owned()).collect();
            assert_eq!(got, request);
        }
    }
}
