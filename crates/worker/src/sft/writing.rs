//! Conversations as tokens, as the model will see them: what precedes an answer at generation is context; the answer is
//! learnt up to its end token.

use anyhow::{Result, bail};
use pacs_data::Prompter;
use pacs_learner::Text;
use pacs_model::ModelConfig;
use pacs_text::Message;

use super::rows::ASSISTANT;

/// Formats conversations for one model.
pub(super) struct Writer {
    /// The prompter of rollouts also formats what precedes an answer, so that both are the same text.
    prompter: Prompter,
    end_tokens: Vec<u32>,
}

impl Writer {
    /// Creates the writer of a model.
    pub(super) fn new(prompter: Prompter, config: &ModelConfig) -> Self {
        Self { prompter, end_tokens: config.end_tokens.clone() }
    }

    /// Formats a conversation as texts to learn from. It is one text if the text before each answer begins with
    /// everything written so far. Templates that format earlier answers differently from the last one (without their
    /// reasoning, say) give one text per answer.
    pub(super) fn texts(&self, messages: &[Message]) -> Result<Vec<Text>> {
        let (mut texts, mut text, mut written) = (Vec::new(), Text::default(), String::new());
        // Marks are part of everything compared here, and are removed by encoding.
        let (as_text, messages) = self.prompter.as_text(messages);
        for (i, _) in messages.iter().enumerate().filter(|(_, message)| message.role == ASSISTANT) {
            let (context, whole) = (self.prompter.asking(&messages[..i])?, self.prompter.answered(&messages[..=i])?);
            let Some(answer) = whole.strip_prefix(&context) else {
                bail!("the chat template does not write answer {i} after the prompt that asks for it");
            };
            match context.strip_prefix(&written) {
                Some(next) if !text.tokens.is_empty() => {
                    text.extend(&as_text.encode(next, false)?.tokens, false);
                }
                _ => {
                    if !text.tokens.is_empty() {
                        texts.push(std::mem::take(&mut text));
                    }
                    text.extend(&as_text.encode(&context, self.prompter.is_plain())?.tokens, false);
                }
            }
            self.add_answer(&mut text, as_text.encode(answer, false)?.tokens);
            written = whole;
        }
        texts.push(text);
        Ok(texts)
    }

    /// Adds an answer, learnt up to its first end token; what the template writes after it is context.
    fn add_answer(&self, text: &mut Text, mut tokens: Vec<u32>) {
        let mut end = tokens.iter().position(|token| self.end_tokens.contains(token));
        if let (None, true, Some(token)) = (end, self.prompter.is_plain(), self.end_tokens.first()) {
            end = Some(tokens.len());
            tokens.push(*token);
        }
        let learnt = end.map_or(tokens.len(), |end| end + 1);
        text.extend(&tokens[..learnt], true);
        text.extend(&tokens[learnt..], false);
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
    }

    fn writer(folder: &Path) -> Writer {
        let prompter = Prompter::read(folder, None, String::new()).expect("golden tokenizer");
        Writer::new(prompter, &ModelConfig::read(folder).expect("golden model"))
    }

    /// Returns the learnt part of each text, and the whole text.
    fn written(writer: &Writer, messages: &[(&str, &str)]) -> Vec<(String, String)> {
        let message = |(role, content): &(&str, &str)| Message { role: role.to_string(), content: content.to_string() };
        let messages: Vec<Message> = messages.iter().map(message).collect();
        let decode = |tokens: &[u32]| writer.prompter.tokenizer().decode(tokens, false).expect("known tokens");
        let texts = writer.texts(&messages).expect("a conversation");
        let parts = texts.iter().map(|text| {
            let learnt: Vec<u32> =
                text.tokens.iter().zip(&text.learnt).filter(|(_, learnt)| **learnt).map(|(token, _)| *token).collect();
            (decode(&learnt), decode(&text.tokens))
        });
        parts.collect()
    }

    #[test]
    fn answers_are_learnt_up_to_their_end() {
        let turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")];
        for (model, one_text) in [("llama3", true), ("qwen2-tied", true), ("qwen3", false)] {
            let parts = written(&writer(&golden(model)), &turns);
            assert_eq!(parts.len(), if one_text { 1 } else { 2 }, "{model}: {parts:?}");
            let learnt: String = parts.iter().map(|part| part.0.as_str()).collect();
            let (first, second) = learnt.split_once('2').expect("the first answer");
            assert!(!first.contains("1+1") && second.contains('4') && !second.contains("2+2"), "{model}: {learnt}");
            let whole = &parts.last().expect("a text").1;
            assert!(whole.contains("1+1?") && whole.contains("2+2?"), "{model}: {whole}");
        }
        let parts = written(&writer(&golden("qwen2-tied")), &turns);
        assert_eq!(parts[0].0, "2<|im_end|>4<|im_end|>");
    }

    #[test]
    fn without_a_template_prompt_and_answer_stand_as_they_are() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["config.json", "tokenizer.json"] {
            std::fs::copy(golden("qwen2-tied").join(name), folder.path().join(name)).expect("copied");
        }
        let writer = writer(folder.path());
        let end = writer.prompter.tokenizer().decode(&writer.end_tokens[..1], false).expect("a token");
        let parts = written(&writer, &[("user", "1+1="), ("assistant", "2")]);
        assert_eq!(parts, [(format!("2{end}"), format!("1+1=2{end}"))]);
        let parts = written(&writer, &[("system", "Add."), ("user", "1+1="), ("assistant", "2")]);
        assert_eq!(parts[0].1, format!("Add.\n\n1+1=2{end}"), "as a rollout with a system message is asked");
        let turns = [("user", "1+1="), ("assistant", "2"), ("user", "2+2="), ("assistant", "4")];
        let parts = written(&writer, &turns);
        assert_eq!(
            parts.len(),
            2,
            "an empty line parts earlier turns, as it does in what a rollout is asked: {parts:?}"
        );
    }
    /// A model is tuned on exactly the tokens that a rollout starts from, for any question and template.
    #[test]
    fn sft_prompts_are_those_of_rollouts() {
        let plain = tempfile::tempdir().expect("a temporary folder");
        for name in ["config.json", "tokenizer.json"] {
            std::fs::copy(golden("qwen2-tied").join(name), plain.path().join(name)).expect("copied");
        }
        let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mark }}";
        let variables = || serde_json::json!({"mark": "!", "enable_thinking": false});
        for folder in [plain.path().to_owned(), golden("qwen2-tied"), golden("qwen3"), golden("llama3")] {
            for own in [None, Some(template)] {
                for system in [None, Some("Add.")] {
                    let prompter = || {
                        let (system, suffix) = (system.map(str::to_owned), " Think.".to_owned());
                        let read = Prompter::read(&folder, system, suffix).expect("golden tokenizer");
                        let read = match own {
                            Some(source) => read.with_template(source, Path::new("test")).expect("a template"),
                            None => read,
                        };
                        read.with_variables(variables().as_object().expect("an object").clone())
                    };
                    let asked = prompter().question("1+1?").expect("a prompt").tokens;
                    let user = Message::user("1+1? Think.");
                    let answer = Message { role: ASSISTANT.to_owned(), content: "2".to_owned() };
                    let row = [system.map(Message::system), Some(user), Some(answer)];
                    let messages: Vec<Message> = row.into_iter().flatten().collect();
                    let writer = Writer::new(prompter(), &ModelConfig::read(&folder).expect("golden model"));
                    // A template that writes something after the answer but nothing before it cannot be learnt from.
                    let Ok(texts) = writer.texts(&messages) else {
                        assert!(own.is_some(), "{folder:?}");
                        continue;
                    };
                    let learnt = texts[0].learnt.iter().take_while(|learnt| !**learnt).count();
                    assert_eq!(texts[0].tokens[..learnt], asked[..], "{folder:?} {own:?} {system:?}");
                }
            }
        }
    }
}
