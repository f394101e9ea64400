//! Reading Rust source as far as the tidy rules need it: tokens with their lines, paths with their imports resolved, and
//! where functions begin and end.
//!
//! Comments and literals are not tokens, so no rule mistakes prose for code. Absent: macros' expansions and types.

use std::collections::HashMap;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// An identifier, keyword or number; `::`; one character of punctuation; `"` for any literal in quotes.
    pub text: &'a str,
    /// Counted from 1.
    pub line: usize,
}

/// A path as code uses or imports it, its first segment replaced by what it was imported as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedPath {
    pub segments: Vec<String>,
    pub line: usize,
}

impl UsedPath {
    pub fn starts_with(&self, prefix: &str) -> bool {
        prefix.split("::").enumerate().all(|(i, want)| self.segments.get(i).is_some_and(|have| have == want))
    }
}

/// Splits source text into tokens.
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let (mut tokens, mut at, mut line) = (Vec::new(), 0, 1);
    while at < bytes.len() {
        let (end, text) = match bytes[at] {
            b if b.is_ascii_whitespace() => (at + 1, None),
            b'/' if bytes[at..].starts_with(b"//") => (text[at..].find('\n').map_or(bytes.len(), |n| at + n), None),
            b'/' if bytes[at..].starts_with(b"/*") => (block_comment_end(bytes, at), None),
            b'"' => (string_end(bytes, at), Some("\"")),
            b'\'' => match char_end(text, at) {
                Some(end) => (end, Some("\"")),
                None => (at + 1, Some("'")),
            },
            b'r' | b'b' | b'c' if literal_end(bytes, at).is_some() => {
                (literal_end(bytes, at).expect("just seen"), Some("\""))
            }
            b':' if bytes[at..].starts_with(b"::") => (at + 2, Some("::")),
            b if is_word(b) => {
                let end = (at..bytes.len()).find(|&i| !is_word(bytes[i])).unwrap_or(bytes.len());
                (end, Some(&text[at..end]))
            }
            b if b.is_ascii() => (at + 1, Some(&text[at..at + 1])),
            _ => (at + 1, None),
        };
        tokens.extend(text.map(|text| Token { text, line }));
        line += bytes[at..end].iter().filter(|&&b| b == b'\n').count();
        at = end;
    }
    tokens
}

/// The same without `#[cfg(test)] mod … { … }`: what is shipped.
pub fn without_tests<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    const MARK: [&str; 8] = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    let (mut kept, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let marked = tokens.len() >= at + 10 && MARK.iter().zip(&tokens[at..]).all(|(want, have)| have.text == *want);
        if marked && tokens[at + 9].text == "{" {
            at = matching_brace(tokens, at + 9) + 1;
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Every path that the code imports or names, with imports resolved.
pub fn paths(tokens: &[Token]) -> Vec<UsedPath> {
    let (mut found, mut names, mut at) = (Vec::new(), HashMap::new(), 0);
    let mut named = Vec::new();
    while at < tokens.len() {
        if tokens[at].text == "use" && is_item_start(tokens, at) {
            at = use_tree(tokens, at + 1, &[], &mut found, &mut names);
        } else if starts_path(tokens, at) {
            let start = at;
            let mut segments = vec![tokens[at].text.to_owned()];
            while text(tokens, at + 1) == "::" && is_name(text(tokens, at + 2)) {
                segments.push(tokens[at + 2].text.to_owned());
                at += 2;
            }
            named.push(UsedPath { segments, line: tokens[start].line });
            at += 1;
        } else {
            at += 1;
        }
    }
    for mut path in named {
        if let Some(full) = names.get(&path.segments[0]) {
            path.segments.splice(..1, full.iter().cloned());
        }
        found.push(path);
    }
    found
}

/// Functions with a body: name, first line, number of lines.
pub fn functions<'a>(tokens: &[Token<'a>]) -> Vec<(&'a str, usize, usize)> {
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if token.text != "fn" || !is_name(text(tokens, at + 1)) {
            continue;
        }
        // The body is the first brace outside parentheses and brackets; a `;` first means that there is none.
        let mut depth = 0i32;
        for (i, part) in tokens.iter().enumerate().skip(at + 2) {
            match part.text {
                "(" | "[" => depth += 1,
                ")" | "]" => depth -= 1,
                ";" if depth == 0 => break,
                "{" if depth == 0 => {
                    let last = tokens[matching_brace(tokens, i)].line;
                    found.push((tokens[at + 1].text, token.line, last - token.line + 1));
                    break;
                }
                _ => {}
            }
        }
    }
    found
}

/// Reads one tree of a `use` item from `at`; returns the index after it.
fn use_tree(
    tokens: &[Token],
    mut at: usize,
    prefix: &[String],
    found: &mut Vec<UsedPath>,
    names: &mut HashMap<String, Vec<String>>,
) -> usize {
    let line = tokens.get(at).map_or(0, |token| token.line);
    let mut segments = prefix.to_vec();
    loop {
        match text(tokens, at) {
            "::" => at += 1,
            "{" => {
                at += 1;
                while !matches!(text(tokens, at), "}" | "") {
                    at = use_tree(tokens, at, &segments, found, names);
                    at += usize::from(text(tokens, at) == ",");
                }
                return at + 1;
            }
            "*" => {
                found.push(UsedPath { segments, line });
                return at + 1;
            }
            "self" if !segments.is_empty() => at += 1,
            name if is_name(name) && name != "as" => {
                segments.push(name.to_owned());
                at += 1;
            }
            _ => break,
        }
    }
    let mut name = segments.last().cloned().unwrap_or_default();
    if text(tokens, at) == "as" {
        name = text(tokens, at + 1).to_owned();
        at += 2;
    }
    // `super` and `crate` as a whole path are no names that code could use.
    if !segments.is_empty() {
        names.insert(name, segments.clone());
        found.push(UsedPath { segments, line });
    }
    at
}

fn starts_path(tokens: &[Token], at: usize) -> bool {
    let follows = at > 0 && matches!(tokens[at - 1].text, "::" | ".");
    let leading = at > 0 && tokens[at - 1].text == "::" && !(at > 1 && is_name(tokens[at - 2].text));
    is_name(tokens[at].text) && text(tokens, at + 1) == "::" && (!follows || leading)
}

/// `use<'a>` in a return type is no import.
fn is_item_start(tokens: &[Token], at: usize) -> bool {
    text(tokens, at + 1) != "<" && (at == 0 || tokens[at - 1].text != "+")
}

fn matching_brace(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return i;
        }
    }
    tokens.len() - 1
}

fn text<'a>(tokens: &[Token<'a>], at: usize) -> &'a str {
    tokens.get(at).map_or("", |token| token.text)
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn block_comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// The end of the string whose opening quote is at `at`.
fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut i = at + 1;
    while i < bytes.len() {
        match bytes[i] {
            b'\\' => i += 2,
            b'"' => return i + 1,
            _ => i += 1,
        }
    }
    bytes.len()
}

/// The end of a character literal; `None` for a lifetime.
fn char_end(text: &str, at: usize) -> Option<usize> {
    let rest = &text[at + 1..];
    let first = rest.chars().next()?;
    if first == '\\' {
        // The escaped character itself may be a quote.
        let skip = 1 + rest[1..].chars().next()?.len_utf8();
        return rest[skip..].find('\'').map(|n| at + 1 + skip + n + 1);
    }
    rest[first.len_utf8()..].starts_with('\'').then(|| at + 1 + first.len_utf8() + 1)
}

/// The end of a raw, byte or C string, or byte character, that begins at `at`.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let prefix = bytes[at..].iter().take_while(|b| matches!(b, b'r' | b'b' | b'c')).count();
    let raw = bytes[at..at + prefix].contains(&b'r');
    let hashes = bytes[at + prefix..].iter().take_while(|&&b| b == b'#').count();
    let quote = at + prefix + hashes;
    match bytes.get(quote) {
        Some(b'"') if raw => {
            let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
            let end = bytes[quote + 1..].windows(close.len()).position(|window| window == close);
            Some(end.map_or(bytes.len(), |n| quote + 1 + n + close.len()))
        }
        Some(b'"') if hashes == 0 => Some(string_end(bytes, quote)),
        Some(b'\'') if hashes == 0 && prefix == 1 && bytes[at] == b'b' => {
            let close = if bytes.get(quote + 1) == Some(&b'\\') { quote + 3 } else { quote + 2 };
            (close..bytes.len()).find(|&i| bytes[i] == b'\'').map(|i| i + 1)
        }
        _ => None,
    }
}
