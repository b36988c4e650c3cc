//! Attention of one new token a row over the blocks of the cache. `B` rows, `N` query heads, `K` key heads, `H` head width,
//! `P` blocks of `S` tokens.

use tch::{Device, Kind, Tensor};

use super::layer::{dimension, number};
use super::{DeviceKernels, KernelError};
use crate::{BLOCK_TOKENS, BlockRow};

/// Warps of a block of the kernel, each of which takes a block of the cache at a time.
const WARPS: usize = 4;
/// Fewest blocks of the cache that are worth a split: one a warp.
const SMALLEST_SPLIT: usize = WARPS;
/// Blocks of the kernel that run on a processor at a time: their registers allow two with large groups, three with small ones.
const BLOCKS_PER_PROCESSOR: usize = 2;
/// What the kernel reads at once.
const LANE_BYTES: usize = 16;

/// Which blocks the rows of a pass attend to, on the device: the same for all layers.
#[derive(Debug)]
pub struct DecodeTable {
    /// Int32: for each row the blocks of the prompt, then those of the answer.
    pub(super) blocks: Tensor,
    /// `[B, 4]` int32: blocks of the prompt, its tokens, tokens of the answer, where in `blocks` the row begins.
    pub(super) runs: Tensor,
    pub(super) rows: usize,
    pub(super) longest: usize,
    pub(super) largest: u32,
}

/// Columns of [`DecodeTable::runs`].
pub(super) const RUN_COLUMNS: usize = 4;

impl DecodeTable {
    /// The table of some rows, none of them empty.
    ///
    /// # Panics
    /// When a row has no tokens, or fewer blocks than they take.
    #[must_use]
    pub fn new(rows: &[BlockRow<'_>], device: Device) -> Self {
        let TableNumbers { blocks, runs, longest, largest } = TableNumbers::of(rows);
        let upload = |values: &[i32]| Tensor::from_slice(values).to_device(device);
        let runs = upload(&runs).view([rows.len() as i64, RUN_COLUMNS as i64]);
        Self { blocks: upload(&blocks), runs, rows: rows.len(), longest, largest }
    }

    /// The same table once more.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { blocks: self.blocks.shallow_clone(), runs: self.runs.shallow_clone(), ..*self }
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// The numbers of a table.
#[derive(Debug)]
pub(super) struct TableNumbers {
    pub(super) blocks: Vec<i32>,
    pub(super) runs: Vec<i32>,
    pub(super) longest: usize,
    pub(super) largest: u32,
}

impl TableNumbers {
    pub(super) fn of(rows: &[BlockRow<'_>]) -> Self {
        let mut numbers =
            Self { blocks: Vec::new(), runs: Vec::with_capacity(RUN_COLUMNS * rows.len()), longest: 0, largest: 0 };
        let count = |tokens: usize| i32::try_from(tokens).expect("a row has fewer than 2^31 tokens");
        for row in rows {
            let start = numbers.blocks.len();
            for run in row {
                let used = run.tokens.div_ceil(BLOCK_TOKENS);
                assert!(used <= run.blocks.len(), "{} tokens in {} blocks", run.tokens, run.blocks.len());
                let blocks = &run.blocks[..used];
                numbers.largest = blocks.iter().copied().fold(numbers.largest, u32::max);
                let index = |block: &u32| i32::try_from(*block).expect("a cache has fewer than 2^31 blocks");
                numbers.blocks.extend(blocks.iter().map(index));
            }
            let blocks = numbers.blocks.len() - start;
            assert!(blocks > 0, "a row has no tokens");
            numbers.longest = numbers.longest.max(blocks);
            let [prompt, answer] = row.map(|run| run.tokens);
            numbers.runs.extend([prompt.div_ceil(BLOCK_TOKENS), prompt, answer, start].map(count));
        }
        numbers
    }
}

/// Where new tokens go, on the device: the same for all layers.
#[derive(Debug)]
pub struct DecodeSlots {
    /// `[T, 2]` int32: block and place.
    pub(super) slots: Tensor,
    pub(super) largest: u32,
}

impl DecodeSlots {
    /// Block and place of each token.
    ///
    /// # Panics
    /// When a place lies outside of a block.
    #[must_use]
    pub fn new(slots: &[(u32, u32)], device: Device) -> Self {
        let numbers: Vec<i32> = slots.iter().copied().flat_map(Self::numbers).collect();
        let largest = slots.iter().map(|slot| slot.0).max().unwrap_or(0);
        Self { slots: Tensor::from_slice(&numbers).to_device(device).view([slots.len() as i64, 2]), largest }
    }

    /// The same slots once more.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { slots: self.slots.shallow_clone(), ..*self }
    }

    pub(super) fn numbers((block, place): (u32, u32)) -> [i32; 2] {
        assert!((place as usize) < BLOCK_TOKENS, "a block has {BLOCK_TOKENS} places");
        [block, place].map(|number| i32::try_from(number).expect("a cache has fewer than 2^31 blocks"))
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.slots
    }

    /// Refuses slots beyond so many blocks.
    pub(super) fn expect_within(&self, blocks: i64) {
        assert!(i64::from(self.largest) < blocks, "block {} of {blocks}", self.largest);
    }
}

impl DeviceKernels {
    /// Attention of one query a row; each key and value is read once for the query heads of its group that are computed
    /// together. Where rows are few, each is divided along its tokens.
    ///
    /// `q`: `[B, N, H]`, rotated, contiguous; `keys`: `[P, K, H, S]` and `values`: `[P, K, S, H]` of one layer. Scores and
    /// sums are float32. Returns `[B, N H]`.
    ///
    /// # Errors
    /// When a launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels, or the table names a block that is not there.
    pub fn attend_blocks(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        table: &DecodeTable,
    ) -> Result<Tensor, KernelError> {
        let shape = self.shape();
        let [n, k, h, s] = [shape.heads, shape.kv_heads, shape.head_dim, BLOCK_TOKENS].map(|size| size as i64);
        let rows = table.rows as i64;
        let blocks = keys.size()[0];
        self.expect("queries", q, &[rows, n, h]);
        self.expect("keys", keys, &[blocks, k, h, s]);
        self.expect("values", values, &[blocks, k, s, h]);
        assert!(i64::from(table.largest) < blocks, "block {} of {blocks}", table.largest);
        for cache in [keys, values] {
            assert!((cache.data_ptr() as usize).is_multiple_of(LANE_BYTES), "a cache at an odd address");
        }
        let splits = self.decode_splits(table.rows, table.longest);
        let output = Tensor::empty([rows, n * h], (q.kind(), q.device()));
        // Where nothing is split nothing is written to these.
        let parts = if splits == 1 { 0 } else { rows * n * splits as i64 };
        let partial = Tensor::empty([parts, h], (Kind::Float, q.device()));
        let states = Tensor::empty([parts, 2], (Kind::Float, q.device()));
        let arguments = [
            q.into(),
            (n * h).into(),
            keys.into(),
            values.into(),
            (&table.blocks).into(),
            (&table.runs).into(),
            (&output).into(),
            (&partial).into(),
            (&states).into(),
            number(k),
            (1.0 / (h as f32).sqrt()).into(),
        ];
        let grid = [dimension(table.rows), dimension(shape.heads / shape.together()), dimension(splits)];
        self.run("attend_blocks", grid, 32 * WARPS as u32, &arguments)?;
        if splits > 1 {
            let arguments = [(&partial).into(), (&states).into(), (&output).into(), number(splits as i64)];
            let threads = dimension(shape.head_dim.next_multiple_of(32));
            self.run("combine_splits", [dimension(table.rows), dimension(shape.heads), 1], threads, &arguments)?;
        }
        Ok(output)
    }

    /// Into how many parts each of `rows` rows is divided along its tokens, the longest having `longest` blocks: as many as run
    /// at a time, if none of them has next to nothing to do. More would be worse: a block of the kernel waits for memory some
    /// three times before it has its first key, which is as long as it takes for one or two blocks of the cache, and a second
    /// turn of blocks waits once more.
    #[must_use]
    pub fn decode_splits(&self, rows: usize, longest: usize) -> usize {
        let units = rows * self.shape().heads / self.shape().together();
        let wanted = BLOCKS_PER_PROCESSOR * self.machine.processors() as usize / units.max(1);
        // Few numbers of splits: a recorded pass has one.
        wanted.min(longest.next_power_of_two() / SMALLEST_SPLIT).max(1)
    }
}
