//! From logits to tokens. `B` rows, `V` vocabulary.

use tch::{Kind, Tensor};

use super::layer::{dimension, number};
use super::{DeviceKernels, KernelError};
use crate::{Drawn, Filters};

/// What one row of logits is drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDraw {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// What may be drawn.
    pub filters: Filters,
    /// Key of the sample's noise.
    pub noise_key: u64,
    /// Position of the token in its answer, which counts the noise.
    pub position: u64,
}

/// Words of 64 bits that the kernel takes and gives a row.
const OPTION_WORDS: usize = 5;
const DRAWN_WORDS: usize = 3;

/// Most tiles that a row is cut into, and the smallest tile.
const MOST_TILES: usize = 256;
const SMALLEST_TILE: usize = 1024;
const TILE_STEP: usize = 256;
const THREADS: u32 = 512;

impl DeviceKernels {
    /// Draws one token a row by inverting the cumulative distribution at the uniform number of the row's key and position,
    /// and gives its log-probs. What [`crate::draw`] does in host memory.
    ///
    /// `logits`: `[B, V]`, contiguous. Waits for the device.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When there are not as many rows of options as of logits, or the logits are none of these kernels.
    pub fn draw(&self, logits: &Tensor, rows: &[RowDraw]) -> Result<Vec<Drawn>, KernelError> {
        let (count, vocabulary) = logits.size2().expect("logits are [B, V]");
        self.expect("logits", logits, &[rows.len() as i64, vocabulary]);
        assert!(count > 0 && vocabulary > 0, "logits {count} x {vocabulary}");
        let words: Vec<i64> = rows.iter().flat_map(RowDraw::words).map(u64::cast_signed).collect();
        let options = Tensor::from_slice(&words).to_device(logits.device());
        let drawn = Tensor::empty([count, DRAWN_WORDS as i64], (Kind::Int64, logits.device()));
        let tile = (vocabulary as usize).div_ceil(MOST_TILES).next_multiple_of(TILE_STEP).max(SMALLEST_TILE);
        let packed = self.packed(vocabulary, std::iter::once(logits));
        let arguments = [
            logits.into(),
            (&options).into(),
            (&drawn).into(),
            number(vocabulary),
            number(tile as i64),
            i32::from(packed).into(),
        ];
        self.run("draw", [dimension(rows.len()), 1, 1], THREADS, &arguments)?;
        let words: Vec<i64> = Vec::try_from(drawn.view([-1])).map_err(|error: tch::TchError| KernelError::Call {
            call: "copy the tokens to the host".to_owned(),
            message: error.to_string(),
        })?;
        Ok(words.as_chunks::<DRAWN_WORDS>().0.iter().map(|words| drawn_of(words.map(i64::cast_unsigned))).collect())
    }
}

impl RowDraw {
    /// The fields of the kernel's `RowOptions`, in their order.
    fn words(&self) -> [u64; OPTION_WORDS] {
        let Filters { top_k, top_p, min_p } = self.filters;
        let inverse = (1.0 / self.temperature) as f32;
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.noise_key,
            self.position,
            top_p.to_bits(),
            pair(inverse.to_bits(), (min_p as f32).to_bits()),
            pair(top_k, 0),
        ]
    }
}

/// The kernel's `Drawn`.
fn drawn_of([token, logprobs, entropy]: [u64; DRAWN_WORDS]) -> Drawn {
    let [low, high] = [logprobs as u32, (logprobs >> 32) as u32].map(f32::from_bits);
    Drawn { token: token as usize, logprob: low, sampled_logprob: high, entropy: f32::from_bits(entropy as u32) }
}
