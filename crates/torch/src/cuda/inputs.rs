//! What a pass that only decodes reads, at one place of the device, so that a recorded pass can be done again with other rows.

use tch::{Device, Kind, TchError, Tensor};

use super::attention::{RUN_COLUMNS, TableNumbers};
use super::drawing::OPTION_WORDS;
use super::{DecodeSlots, DecodeTable, DrawTable, RowDraw};
use crate::{BLOCK_TOKENS, BlockRow, BlockRun};

/// One row of a pass that decodes.
#[derive(Clone, Copy, Debug)]
pub struct DecodeRow<'a> {
    /// Its newest token, which the pass computes.
    pub token: u32,
    /// Where that stands, the first token of a prompt being 0.
    pub position: usize,
    /// Block and place of its key and value.
    pub slot: (u32, u32),
    /// All tokens of the row, the newest one among them.
    pub runs: BlockRow<'a>,
    /// What the next token is drawn with.
    pub draw: RowDraw,
}

/// Room on the device for the numbers of passes of several sizes. It is filled for one pass at a time.
#[derive(Debug)]
pub struct DecodeInputs {
    /// Int64: for so many rows tokens, positions, options, slots and runs, then the table to its end.
    words: Tensor,
    rows: usize,
    /// Blocks of the cache, and the one that rows write to which are there to fill a pass up.
    blocks: u32,
    spare: u32,
}

/// Words of a row, its part of the table apart.
const ROW_WORDS: usize = 2 + OPTION_WORDS + 1 + RUN_COLUMNS / 2;

/// The numbers of passes of one size, as the operations of a pass take them.
#[derive(Debug)]
pub struct DecodePass {
    /// Token of each row, `[B]` int64.
    pub tokens: Tensor,
    /// Position of each row in its sequence, `[B]` int64.
    pub positions: Tensor,
    /// Where keys and values go.
    pub slots: DecodeSlots,
    /// What rows attend to.
    pub table: DecodeTable,
    /// What they draw with.
    pub draws: DrawTable,
}

impl DecodeInputs {
    /// Room for up to `rows` rows of at most `row_tokens` tokens each, in a cache of `blocks`. The last block of the cache
    /// must have no owner.
    ///
    /// # Errors
    /// When there is no memory.
    ///
    /// # Panics
    /// When there are no blocks.
    pub fn new(rows: usize, row_tokens: usize, blocks: u32, device: Device) -> Result<Self, TchError> {
        let spare = blocks.checked_sub(1).expect("a cache has blocks");
        // Prompt and answer each end within a block.
        let row_blocks = (row_tokens.div_ceil(BLOCK_TOKENS) + 1).min(blocks as usize);
        let words = rows * ROW_WORDS + (rows * row_blocks).div_ceil(2);
        Ok(Self { words: Tensor::f_zeros([words as i64], (Kind::Int64, device))?, rows, blocks, spare })
    }

    /// Brings the numbers of `rows` to the device, for a pass of `size` rows. Returns how many blocks the longest has.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room for the rows, or one names a block that is not there.
    pub fn fill(&mut self, rows: &[DecodeRow<'_>], size: usize) -> Result<usize, TchError> {
        assert!(rows.len() <= size && size <= self.rows, "{} rows for {size} of {}", rows.len(), self.rows);
        // A row that fills up sees the one token that it writes, so that it computes numbers.
        let spare = [self.spare];
        let none = BlockRun { blocks: &[], tokens: 0 };
        let filler = DecodeRow {
            token: 0,
            position: 0,
            slot: (self.spare, 0),
            runs: [BlockRun { blocks: &spare, tokens: 1 }, none],
            draw: RowDraw::PLAIN,
        };
        let rows: Vec<DecodeRow<'_>> = rows.iter().copied().chain(std::iter::repeat(filler)).take(size).collect();
        let runs: Vec<BlockRow<'_>> = rows.iter().map(|row| row.runs).collect();
        let table = TableNumbers::of(&runs);
        let slots: Vec<i32> = rows.iter().flat_map(|row| DecodeSlots::numbers(row.slot)).collect();
        let largest = rows.iter().map(|row| row.slot.0).fold(table.largest, u32::max);
        assert!(largest < self.blocks, "block {largest} of {}", self.blocks);
        let mut words = Vec::with_capacity(size * ROW_WORDS + table.blocks.len().div_ceil(2));
        words.extend(rows.iter().map(|row| i64::from(row.token)));
        words.extend(rows.iter().map(|row| row.position as i64));
        words.extend(rows.iter().flat_map(|row| row.draw.words()));
        words.extend(pairs(&slots));
        words.extend(pairs(&table.runs));
        words.extend(pairs(&table.blocks));
        assert!(words.len() <= self.words.numel(), "{} blocks are more than there is room for", table.blocks.len());
        self.words.f_narrow(0, 0, words.len() as i64)?.f_copy_(&Tensor::f_from_slice(&words)?)?;
        Ok(table.longest)
    }

    /// The numbers of passes of `size` rows, the longest of at most `longest` blocks: views of what [`Self::fill`] writes.
    ///
    /// # Panics
    /// When there is no room for so many rows.
    #[must_use]
    pub fn pass(&self, size: usize, longest: usize) -> DecodePass {
        assert!(0 < size && size <= self.rows, "{size} rows of {}", self.rows);
        let mut start = 0;
        let mut take = |words: usize| {
            start += words as i64;
            self.words.narrow(0, start - words as i64, words as i64)
        };
        let rows = size as i64;
        let [tokens, positions] = [take(size), take(size)];
        let options = take(OPTION_WORDS * size).view([rows, OPTION_WORDS as i64]);
        let slots = take(size).view_dtype(Kind::Int).view([rows, 2]);
        let runs = take(RUN_COLUMNS / 2 * size).view_dtype(Kind::Int).view([rows, RUN_COLUMNS as i64]);
        let blocks = take(self.words.numel() - size * ROW_WORDS).view_dtype(Kind::Int);
        DecodePass {
            tokens,
            positions,
            // What is filled in lies below the end of the cache.
            slots: DecodeSlots { slots, largest: self.spare },
            table: DecodeTable { blocks, runs, rows: size, longest, largest: self.spare },
            draws: DrawTable { words: options },
        }
    }

    /// The most rows of a pass.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Two numbers a word, the first one in its lower half.
fn pairs(numbers: &[i32]) -> impl Iterator<Item = i64> + '_ {
    numbers.chunks(2).map(|pair| {
        let half = |place: usize| u64::from(pair.get(place).copied().unwrap_or(0).cast_unsigned());
        (half(0) | half(1) << 32).cast_signed()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.to_kind(Kind::Int64).view([-1])).expect("host")
    }

    #[test]
    fn a_pass_sees_the_rows_that_were_filled_in_last() {
        let mut inputs = DecodeInputs::new(5, 64, 10, Device::Cpu).expect("room");
        let pass = inputs.pass(3, 2);
        let row = |token: u32, slot, blocks: &'static [u32], tokens: usize| DecodeRow {
            token,
            position: 40 + token as usize,
            slot,
            runs: [BlockRun { blocks: &[7], tokens: 20 }, BlockRun { blocks, tokens }],
            draw: RowDraw { noise_key: u64::MAX, position: 3, ..RowDraw::PLAIN },
        };
        let rows = [row(1, (4, 31), &[2, 4], 64), row(2, (5, 0), &[5], 1)];
        for rows in [&rows[..1], &rows] {
            let fillers = 3 - rows.len();
            assert_eq!(inputs.fill(rows, 3).expect("fits"), 3);
            let with_fillers = |of_rows: &[i64], filler: &[i64]| {
                let of_rows = &of_rows[..of_rows.len() / 2 * rows.len()];
                [of_rows, &filler.repeat(fillers)].concat()
            };
            assert_eq!(numbers(&pass.tokens), with_fillers(&[1, 2], &[0]));
            assert_eq!(numbers(&pass.positions), with_fillers(&[41, 42], &[0]));
            assert_eq!(numbers(&pass.slots.slots), with_fillers(&[4, 31, 5, 0], &[9, 0]));
            let runs = numbers(&pass.table.runs);
            let blocks = numbers(&pass.table.blocks);
            let seen = |row: usize| {
                let [prompt, _, answer, start] = [0, 1, 2, 3].map(|column| runs[4 * row + column] as usize);
                blocks[start..start + prompt + answer.div_ceil(BLOCK_TOKENS)].to_vec()
            };
            assert_eq!(seen(0), [7, 2, 4]);
            assert_eq!(seen(rows.len()), [9]);
            assert_eq!((runs[1], runs[2]), (20, 64));
            let options = numbers(&pass.draws.words);
            assert_eq!((options[0], options[1], options.len()), (-1, 3, 15));
        }
        assert!(std::panic::catch_unwind(move || inputs.fill(&[row(1, (10, 0), &[2], 1)], 1)).is_err(), "no block 10");
    }
}
