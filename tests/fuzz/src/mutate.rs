//! Inputs that are nearly right: a valid example, changed in a few places. Used by bounded property tests, which include this
//! file, and for the first inputs of the fuzzer.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// No input of a few kilobytes may take longer, on a busy machine either.
const DEADLINE: Duration = Duration::from_secs(20);

/// Between the files of an input that is made of several.
const SEPARATOR: &[u8] = b"\n\x00\n";

/// Several files as one input.
#[allow(dead_code, reason = "not every test has inputs of several files")]
pub fn pack(files: &[Vec<u8>]) -> Vec<u8> {
    files.join(SEPARATOR)
}

/// The files of an input; those that it lacks are empty.
#[allow(dead_code, reason = "not every test has inputs of several files")]
pub fn unpack<const N: usize>(mut bytes: &[u8]) -> [&[u8]; N] {
    std::array::from_fn(|_| {
        let end = bytes.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        let file = &bytes[..end.unwrap_or(bytes.len())];
        bytes = end.map_or(&[], |end| &bytes[end + SEPARATOR.len()..]);
        file
    })
}

/// A model folder of the golden ones.
#[allow(dead_code, reason = "not every input has to do with models")]
pub fn golden(model: &str) -> PathBuf {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let root = above.find(|folder| folder.join("tests/golden").is_dir()).expect("the root of the repository");
    root.join("tests/golden/models").join(model)
}

/// Checks the examples and `seeds` changed ones; a failure names its seed. `PACS_SEEDS` and `PACS_FIRST_SEED` say how many.
pub fn each(examples: &[Vec<u8>], seeds: u64, check: impl Fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (first, count) = (number("PACS_FIRST_SEED").unwrap_or(0), number("PACS_SEEDS").unwrap_or(seeds));
    let tried = |what: &str, bytes: &[u8]| {
        let began = Instant::now();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(bytes))) {
            eprintln!("{what} panics: {}", String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]));
            resume_unwind(panic);
        }
        assert!(began.elapsed() < DEADLINE, "{what} takes {:?}", began.elapsed());
    };
    for (place, example) in examples.iter().enumerate() {
        tried(&format!("example {place}"), example);
    }
    for seed in first..first + count {
        let mut any = Any::new(seed);
        let mut bytes = examples[any.below(examples.len())].clone();
        for _ in 0..=any.below(4) {
            any.change(&mut bytes);
        }
        tried(&format!("seed {seed}"), &bytes);
    }
}

/// Choices, from one seed.
pub struct Any(u64);

impl Any {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % count.max(1) as u64) as usize
    }

    fn slice(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(64) + 1)
    }

    /// Changes one place.
    pub fn change(&mut self, bytes: &mut Vec<u8>) {
        let (length, place) = (bytes.len(), self.below(bytes.len() + 1));
        match self.below(10) {
            0 if length > 0 => bytes[place.min(length - 1)] ^= 1 << self.below(8),
            1 if length > 0 => bytes[place.min(length - 1)] = self.next() as u8,
            2 => bytes.truncate(place),
            3 => drop(bytes.drain(self.slice(length))),
            4 => {
                let copied = bytes[self.slice(length)].to_vec();
                bytes.splice(place..place, copied);
            }
            5 if length >= 8 => {
                let border = [0, 1, u64::MAX, u64::MAX >> 1, 1 << 63, 1 << 32, u64::from(u32::MAX), 1 << 40];
                let width = [1, 2, 4, 8][self.below(4)];
                let value = border[self.below(border.len())].to_le_bytes();
                let place = place.min(length - width);
                bytes[place..place + width].copy_from_slice(&value[..width]);
            }
            6 => {
                let deep = [b"[".as_slice(), b"{\"a\":", b"(", b"{% for a in b %}"];
                let deep = deep[self.below(deep.len())].repeat(1 << self.below(13));
                bytes.splice(place..place, deep);
            }
            7 => self.change_number(bytes, place),
            8 => {
                let words: [&[u8]; 12] = [
                    b"null",
                    b"-1",
                    b"1e999",
                    b"\"\"",
                    b"[]",
                    b"{}",
                    b"\x00",
                    b"\xff\xfe",
                    b"18446744073709551616",
                    b"true",
                    b"\\ud800",
                    b"../../x",
                ];
                bytes.splice(place..place, words[self.below(words.len())].iter().copied());
            }
            _ => {
                let run = vec![bytes.get(place).copied().unwrap_or(b'a'); self.below(5000)];
                bytes.splice(place..place, run);
            }
        }
    }

    /// Puts another number in the place of the next one of a text.
    fn change_number(&mut self, bytes: &mut Vec<u8>, from: usize) {
        let digit = |byte: &u8| byte.is_ascii_digit();
        let Some(start) = bytes.iter().skip(from).position(digit).map(|found| from + found) else { return };
        let end = bytes[start..].iter().position(|byte| !digit(byte)).map_or(bytes.len(), |found| start + found);
        let numbers = [
            "0",
            "-1",
            "1",
            "9007199254740993",
            "18446744073709551615",
            "4294967296",
            "1e308",
            "0.0000001",
            "nan",
            "3",
        ];
        bytes.splice(start..end, numbers[self.below(numbers.len())].bytes());
    }
}
